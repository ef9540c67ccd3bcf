"""Experts are skipped whose answer counts little, in layers that the predictions depend on little.

    expert i of a token in layer l is skipped if  a_l pi_i < threshold
    a_l = KL_l / sum of KL over layers,  KL_l = mean over tokens of KL(model || model without the routed experts of l)

pi_i: the weight by which the expert's answer counts. MoDES (Huang et al., 2025), here for text: one threshold. It is
found by bisection, such that on the calibration data `ratio` of all pairs of a token and a chosen expert is skipped,
with the skipping in force. Experts that every token goes to stay. Differs from the paper: where a router lets the
weights of the chosen experts add up to 1, pi is that weight, not the softmax over all experts.

    score: modes    a_l pi_i
           router   pi_i
           random   drawn by lot, from the token's hidden state, the expert and the seed
"""
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.experts.base import ExpertsMethod
from llmopt.experts.threshold import bisected, candidates, first_batches, layer_weights, skipped, watched
from llmopt.files.json_shapes import finite
from llmopt.method import Record, Run, Sample
from llmopt.model.experts import Routed
from llmopt.parts import register
from llmopt.runtime.gates import layers_with_experts
from llmopt.runtime.lots import lots, mixed

BITS = 48           # of a token's hidden state, which say how it is drawn: the signs of so many channels
NEAR = 0.02         # how far from `ratio` the share that is skipped may be


@register("experts.skip")
@dataclass(frozen=True)
class Skip(ExpertsMethod):
    """As many forwards over some calibration data as there are layers with experts, and a dozen more."""

    meta_shape: ClassVar[Any] = {"threshold": finite, "layers": {str: finite}, str: object}
    needs_data: ClassVar[bool] = True

    ratio: float = Field(0.25, ge=0, le=1, description="share of the pairs of a token and a chosen expert to skip")
    score: Literal["modes", "router", "random"] = Field(
        "modes", description="what tells which: the layer's worth times the router's weight, that weight alone, lots")
    tokens: int = Field(8192, ge=1, description="of the calibration data that are read, in whole batches")
    whole_layers: bool = Field(False, description="allow that all experts of a layer are skipped for every token")
    seed: int = Field(0, ge=0, lt=2 ** 31, description="score: random: of the draw")

    def check(self) -> None:
        if self.ratio == 1 and not self.whole_layers:
            raise FieldError("ratio", self.ratio, "less than 1, or whole_layers: true, as every expert of every layer "
                             "would be skipped,")

    def sample(self, run: Run) -> Sample:
        return Sample(run, 1, "all")

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"threshold"; "layers": a_l by the layer's index; "skipped": the share of all pairs; "by_layer"}."""
        layers_with_experts(model)
        return Record(run.memory.remember(self.name, lambda: run.ranks.agree(self._decided(model, run))))

    def _decided(self, model: nn.Module, run: Run) -> dict[str, Any]:
        batches = first_batches(run, self.tokens)
        weights = (layer_weights(model, run, batches) if self.score == "modes" else
                   dict.fromkeys(layers_with_experts(model), 1.0))
        meta: dict[str, Any] = {"threshold": 0.0, "layers": {str(layer): one for layer, one in weights.items()}}

        @cache
        def by_layer(threshold: float) -> dict[int, float]:
            left = partial(self.left, Record(meta | {"threshold": threshold}))
            return skipped(model, run, batches, left)

        def share(threshold: float) -> float:
            return sum(by_layer(threshold).values()) / len(weights)

        thresholds = candidates(torch.cat(run.ranks.gather(self._scores_of(model, batches, meta))))
        meta["threshold"] = bisected(share, thresholds, self.ratio)
        meta["skipped"] = share(meta["threshold"])
        meta["by_layer"] = {str(layer): one for layer, one in by_layer(meta["threshold"]).items()}
        self._check(meta)
        return meta

    def _scores_of(self, model: nn.Module, batches: list, meta: dict[str, Any]) -> Tensor:
        """Those of all pairs of a real token and an expert, while none is skipped."""
        found: list[Tensor] = []
        watched(model, batches, lambda layer, given: given.weights,
                lambda layer, given, left: found.append(self._scores(layer, given, meta).flatten().cpu()))
        return torch.cat(found)

    def _check(self, meta: dict[str, Any]) -> None:
        """Raise BudgetError for a ratio out of reach, LlmoptError for a layer without experts that nobody asked for."""
        if abs(meta["skipped"] - self.ratio) > NEAR:
            raise BudgetError(f"ratio {self.ratio:g} is out of reach: the nearest share that a threshold skips is "
                              f"{meta['skipped']:.3g}, as many scores are equal")
        gone = [layer for layer, one in meta["by_layer"].items() if one == 1]
        if gone and not self.whole_layers:
            raise LlmoptError(f"layer {gone[0]}: all of its experts would be skipped for every token; lower ratio "
                              f"({self.ratio:g}), or allow it by whole_layers: true")

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        self.check_layers(model, record.meta["layers"].keys())

    def _scores(self, layer: int, given: Routed, meta: dict[str, Any]) -> Tensor:                       # [N, k]
        if self.score != "random":
            return meta["layers"][str(layer)] * given.weights.float()
        signs = (given.x[:, :BITS] > 0).long()
        token = mixed(signs @ (1 << torch.arange(signs.shape[1], device=signs.device)))
        return lots(mixed(token + (layer << 32) + self.seed)[:, None] + given.index)

    def kept(self, layer: int, given: Routed, record: Record) -> Tensor:
        return self._scores(layer, given, record.meta) >= record.meta["threshold"]
