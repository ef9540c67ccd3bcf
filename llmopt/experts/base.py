"""Experts that are skipped while the model runs: a method says which of a token's experts are left to it.

Skipped ones are not computed (runtime/gates.py); experts that every token goes to are none of those that can be.
"""
from abc import abstractmethod
from functools import partial

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.model.experts import Routed
from llmopt.runtime.attach import Attachment, RuntimeMethod
from llmopt.runtime.compression import EXPERTS
from llmopt.runtime.gates import Gate, layers_with_experts


@dataclass(frozen=True)
class ExpertsMethod(RuntimeMethod):
    """One at a time is attached; it acts on prompts and on single tokens alike, on each as if it were alone."""

    place = EXPERTS

    renormalize: bool = Field(False, kw_only=True, description="raise the weights of a token's other experts, so that "
                              "they add up to what they did")

    @abstractmethod
    def kept(self, layer: int, given: Routed, record: Record) -> Tensor:
        """Bool [N, k]: which of the chosen experts of each of N tokens are left to it."""

    def left(self, record: Record, layer: int, given: Routed) -> Tensor:
        """The weights [N, k] that count in a layer; 0: skipped."""
        kept = self.kept(layer, given, record)
        if bool(kept.all()):
            return given.weights
        weights = given.weights * kept
        if not self.renormalize:
            return weights
        sums = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights / sums * given.weights.sum(1, keepdim=True)

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        layers_with_experts(skeleton)                   # refuses a model without
        return super().sketch(skeleton, run, source)

    def hooks(self, live: Attachment) -> list[RemovableHandle]:
        left = partial(self.left, live.record(self.place))
        return [handle for layer, experts in layers_with_experts(live.model).items()
                for handle in Gate(experts, layer, left, live.now).hooks()]

    def check_layers(self, model: nn.Module, told: set[str]) -> None:
        """Raise LlmoptError unless a record tells of the layers that have experts, by their index, and of no others."""
        wanted = {str(layer) for layer in layers_with_experts(model)}
        if told != wanted:
            raise LlmoptError(f"{self.name}: the record tells of layers {', '.join(sorted(told)) or 'none'}; this "
                              f"model has experts in {', '.join(sorted(wanted, key=int))}")
