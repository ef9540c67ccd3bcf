"""AWQ: columns of a weight that read large inputs are rounded more finely, because they are scaled up beforehand.

    y = W x = (W diag(s)) (x / s)          s_j = (mean_t |x_tj|)^r / sqrt(max s min s),      r in {0, 1/n, .., (n-1)/n}

1 / s goes into what produces x: a norm's gain, rows of v, rows of up. r is the one whose weights, rounded to the
nearest points of the grids of the quantization step to come, change the block's output least: squares over the real
tokens of some batches, one group of readers after the other, all else dense. r = 0 scales nothing. Where several query
heads read a channel of v, its size is their mean. Lin et al., AWQ, arXiv:2306.00978.

Without a quantization step behind it, for a tool that comes later: 4 bits, one scale a row.

AWQ's search for clipped ranges is the step's to come: quant.rtn with `search: outputs`. Left out: scales for groups
without a producer, such as the writer of an FFN without a gate.
"""
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks
from llmopt.model.links import Link
from llmopt.model.weights import Projection
from llmopt.parts import register
from llmopt.transform.base import Figures, Transform

LEAST = 1e-4            # of a scale before it is normalised
Rounders = dict[str, Callable[[Tensor], Tensor]]


@register("transform.awq")
@dataclass(frozen=True)
class AWQ(Transform):
    """Scales for the quantization step that follows, from what the weights read on the calibration data."""

    uses_inputs: ClassVar = True

    ratios: int = Field(20, ge=2, description="exponents from 0 to below 1 that are tried for each group of readers")
    batches: int = Field(2, ge=1, description="batches of the calibration data on which they are tried, evenly spaced")

    def block(self, block: Block, visit: Visit, run: Run) -> Figures:
        search, sizes, chosen = Search(visit, rounders(visit.model, run), self.batches), mean_sizes(visit), {}
        for link in block.links():
            if link.scalable and any(reader.name in search.rounders for reader in link.readers):
                ratio, left = self._scale(link, sizes[link.readers[0].name], search)
                chosen[link.readers[0].name] = {"ratio": ratio, "error": left}
        return chosen

    def _scale(self, link: Link, sizes: Tensor, search: "Search") -> tuple[float, float]:
        """Scale a link by the best of the ratios; that one, and its share of the error without a scale."""
        ratios = [step / self.ratios for step in range(self.ratios)]
        factors = [scales(link.by_channel(sizes), ratio) for ratio in ratios]
        errors = [search.error(link, factor) for factor in factors]
        best = min(range(self.ratios), key=errors.__getitem__)
        if best:
            link.scale_(1 / factors[best])
        return ratios[best], errors[best] / max(errors[0], 1e-30)


class Search:
    """A block's outputs on some batches, and how much they change when some weights are rounded."""

    def __init__(self, visit: Visit, rounders: Rounders, batches: int):
        self.visit, self.rounders, count = visit, rounders, len(visit.inputs)
        self.tried = [i * count // min(batches, count) for i in range(min(batches, count))]
        self.wanted = [visit.forward(index) for index in self.tried]

    def error(self, link: Link, factor: Tensor) -> float:
        """Squared change of the outputs when the link's readers are rounded with their columns times `factor` [C]."""
        columns = factor if link.columns is None else factor[link.columns]
        readers = [reader for reader in link.readers if reader.name in self.rounders]
        rounded = {self._place(reader): self._rounded(reader, columns) for reader in readers}
        total = 0.0
        for index, wanted in zip(self.tried, self.wanted, strict=True):
            change = self.visit.forward(index, rounded).float() - wanted.float()
            total += float(change[self.visit.masks[index].to(change.device)].square().sum())
        return total

    def _rounded(self, reader: Projection, columns: Tensor) -> Tensor:
        """The weight as its module holds it, once its scaled columns have been rounded."""
        weight = self.rounders[reader.name](reader.weight.float() * columns) / columns
        return (weight.T if reader.transposed else weight).to(reader.weight.dtype)

    def _place(self, reader: Projection) -> str:
        """The parameter's name within the block."""
        return reader.key.removeprefix(f"{self.visit.block.name}.")


def scales(sizes: Tensor, ratio: float) -> Tensor:              # [C] -> [C]
    """Inputs of these mean sizes to the power of `ratio`, the largest the inverse of the smallest."""
    factor = (sizes.float() ** ratio).clamp(min=LEAST)
    return factor / (factor.max() * factor.min()).sqrt()


def mean_sizes(visit: Visit) -> dict[str, Tensor]:
    """mean |x| [in] over the real tokens, by the name of the first projection of each group."""
    sums: dict[str, Tensor] = {}
    tokens = sum(int(mask.sum()) for mask in visit.masks)

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            sums[name] = sums.get(name, 0) + x.abs().sum(0, dtype=torch.float64)
        return add

    visit.observe({group[0].name: adder(group[0].name) for group in visit.block.groups()})
    return {name: total / tokens for name, total in sums.items()}


def rounders(model: nn.Module, run: Run) -> Rounders:
    """How the first quantization step to come will round, by the name of the weight; without one, all by `nearest`."""
    return next((found for step in run.ahead if (found := step.rounders(model))), None) or {
        reader.name: nearest for block in blocks(model) for reader in block.projections()}


def nearest(weight: Tensor) -> Tensor:
    """`weight` [out, in] in 4 bits, symmetric, with one scale a row."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 7.5
    return (weight / step).round_().clamp_(-8, 7) * step
