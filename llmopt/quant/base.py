"""The quantization step: fields (settings.py), the bits of each weight (deciding.py), codes (making.py), figures."""
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.model.forms import FORMS
from llmopt.model.rounded_inputs import round_inputs
from llmopt.model.weights import coded
from llmopt.quant import floats, vocabulary, zeros
from llmopt.quant.deciding import decided, planned
from llmopt.quant.estimated import layer_means
from llmopt.quant.experts import left_dense, of_experts
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.making import Making
from llmopt.quant.plan import DENSE, Target, average_bits, effective_bits
from llmopt.quant.settings import Settings


@dataclass(frozen=True)
class Quantizer(Settings):
    """Weights of the decoder blocks on grids of few numbers; embeddings and the output head stay as they are."""

    def rounders(self, model: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """At the average of its bits where only data will decide."""
        def to_grid(weight: torch.Tensor, spec: Spec) -> torch.Tensor:
            whole = floats.whole(float(weight.abs().max())) if spec.form.scales == "e4m3" else 1.0
            return round_to_nearest(weight.float(), replace(spec, whole=whole)).dequantize(spec.dtype)

        return {t.name: partial(to_grid, spec=self.spec(replace(t, bits=round(t.bits)), model.dtype))
                for t in planned(self, model) if t.bits != DENSE}

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Hangs codes without values on the weights, at fractions of bits where only data will decide."""
        found = planned(self, skeleton)
        if not found:
            raise LlmoptError("nothing is left to quantize")
        weights = {p.name: p for block in blocks(skeleton) for group in block.weights() for p in group}
        for t in found:
            if t.bits != DENSE:
                weights[t.name].codes = self.without_values(t, skeleton.dtype)
        vocabulary.sketch(self, skeleton)
        named = Counter(t.scheme for t in found if t.scheme)
        kind = (f" ({self.scheme})" if self.scheme else "") + "".join(
            f", {count} of them {name}" for name, count in named.items())
        sizes = sorted({t.group_size for t in found} if self.plan else set(self.group_sizes) or {self.group_size})
        groups = "one scale per channel" if sizes == [-1] else "groups of " + " or ".join(
            "all" if size == -1 else str(size) for size in sizes)
        return (f"{len(found)} weights at {average_bits(found):.3g} bits{kind}, {groups}"
                + (f", bits by {self.allocate}" if self.allocate != "uniform" else "")
                + (f", bits by {self.plan}" if self.plan else "")
                + "".join(f", {name} at {given['bits']} bits" for name, given in
                          (("embedding", self.embedding), ("head", self.head)) if given)
                + (f" ({note})" if (note := left_dense(skeleton)) else ""))

    def check_scores(self, scores: list[torch.Tensor], model: nn.Module) -> None:
        layer_means(self.heads, scores, model)

    def apply(self, model: nn.Module, run: Run) -> Record:
        if self.needs_data and not run.batches:
            raise LlmoptError("this step needs calibration data and there is none")
        found, allocation = decided(self, model, run)
        outer = vocabulary.quantize(self, model, run)
        Making(self, model, run).write_all({t.name: t for t in found if t.bits != DENSE})
        round_inputs(model)
        meta = self._meta(model, found)
        return Record(meta=meta | {"modules": outer | meta["modules"]} | allocation)

    def _meta(self, model: nn.Module, found: list[Target]) -> dict:
        figures = {weight.name: weight.codes.figures for weight in coded(model)}
        modules = {t.name: {"bits": t.bits, "group_size": t.group_size, **({"scheme": t.scheme} if t.scheme else {}),
                            **({} if t.bits == DENSE else figures[t.name])} for t in found}

        def beside(target: Target) -> tuple[int, int]:
            kind = self.scheme_of(target)
            form = FORMS[kind.form]
            scale = 8 if form.through_bfloat16 else torch.finfo(self.scale_type(model.dtype, kind, target.at_once)).bits
            return scale + (0 if kind.symmetric else target.bits), form.rows

        notes = [note for note in [left_dense(model)] if note] + zeros.told(figures, {t.name: t.size for t in found})
        told = ({"notes": notes} if notes else {}) | of_experts(found, figures)
        return told | {"bits": average_bits(found), "effective_bits": effective_bits(found, beside),
                "weights": sum(t.size for t in found), "modules": modules}
