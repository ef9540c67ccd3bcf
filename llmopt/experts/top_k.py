"""Fewer experts for each token than the router chooses, in all layers or layer by layer: those of the largest weights.

    kept_i = i is among the k_l largest of the token's weights

A control for experts.skip, which spends as much where it counts. With `renormalize`, on a model whose router lets the
weights of the chosen experts add up to 1, it is the model with another number of experts per token in its config.
"""
from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.experts.base import ExpertsMethod
from llmopt.method import Record, Run
from llmopt.model.experts import Routed
from llmopt.parts import Several, register
from llmopt.runtime.gates import layers_with_experts


@register("experts.top_k")
@dataclass(frozen=True)
class TopK(ExpertsMethod):
    """The same for every token; nothing is measured."""

    meta_shape: ClassVar[Any] = {"k": {str: range(1, 2 ** 31)}, str: object}

    k: int = Field(1, ge=1, description="experts of a token in every layer")
    by_layer: Several[int] = Field((), description="instead: one such number for each layer that has experts, in order")

    def check(self) -> None:
        if self.by_layer and min(self.by_layer) < 1:
            raise FieldError("by_layer", list(self.by_layer), "numbers from 1")

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"k": by the index of a layer with experts, how many each token goes to}."""
        layers = [*layers_with_experts(model)]
        each = self.by_layer or (self.k,) * len(layers)
        if len(each) != len(layers):
            raise FieldError("by_layer", list(each), f"{len(layers)} numbers, one for each layer that has experts,")
        chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        if chosen and max(each) > chosen:
            raise FieldError("by_layer" if self.by_layer else "k", max(each), f"at most {chosen}, as many as the "
                             "router chooses for a token,")
        return Record({"k": {str(layer): k for layer, k in zip(layers, each, strict=True)}})

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        self.plan(skeleton, run)                        # refuses numbers that do not fit
        return super().sketch(skeleton, run, source)

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        self.check_layers(model, record.meta["k"].keys())

    def kept(self, layer: int, given: Routed, record: Record) -> Tensor:
        k, (_, chosen) = record.meta["k"][str(layer)], given.weights.shape
        if k > chosen:
            raise LlmoptError(f"experts.top_k: layer {layer} is to use {k} experts for each token, and its router "
                              f"chooses {chosen}")
        order = given.weights.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1) < k
