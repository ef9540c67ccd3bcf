"""The one walk over weights: each in turn, with what it reads on the calibration data as its solver wants it."""
import copy
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmopt.calibration.beside import visits_beside
from llmopt.calibration.missing import Missing, places
from llmopt.calibration.routed import Routing
from llmopt.calibration.second_moments import Gram, mirrored_
from llmopt.calibration.walk import Visit, each, visits
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.expert_weights import stacks_of
from llmopt.scale.processes import Ranks


class Peak:
    """The largest size among a projection's inputs, over the tokens of all processes."""

    def __init__(self, ranks: Ranks = Ranks()):             # noqa: B008  frozen
        self.peak, self.ranks = 0.0, ranks

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in `x` [N, in]; weights are no part of it."""
        if len(x):
            found = float(torch.stack(x.aminmax()).abs().max())             # NaN comes through
            self.peak = found if not found <= self.peak else self.peak

    def join(self, like: Tensor) -> None:
        """Take in what the other ranks have seen."""
        found = self.ranks.gather(self.peak)
        self.peak = next((peak for peak in found if peak != peak), max(found))


class Moments(Gram):
    """Second moments of a projection's input, hessian = (2 / N) sum_t r_t x_t x_t^T  [in, in], float32.

    size: mean |x| too, (1 / N) sum_t r_t |x_t|  [in]. largest: the peak of the inputs, missing: what they or the
    outputs lack (missing.py), where these were asked for. told: what is to be said of codes that come of them.
    """

    def __init__(self, ranks: Ranks = Ranks(), size: bool = False):         # noqa: B008  frozen
        super().__init__(ranks)
        self.made: dict[Hashable, Any] = {}
        self.wants_size, self.sizes = size, None            # the sum behind `size`, float64
        self.largest: Peak | None = None
        self.missing: Missing | None = None
        self.told: dict[str, Any] = {}

    @property
    def hessian(self) -> Tensor | None:
        """None until a token has come."""
        return self.cached("hessian", self._hessian) if self.tokens else None

    @property
    def size(self) -> Tensor | None:                        # [in] float32
        """Mean absolute input; None if it was not asked for, or no token has come."""
        return None if self.sizes is None else (self.sizes / self.tokens).float()

    def _hessian(self) -> Tensor:
        return mirrored_(self.lower.float().mul_(2 / self.tokens))

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in `x` [N, in]; weights [N] scale the tokens' shares (None: all one)."""
        if not len(x):
            return
        weights = None if weights is None else weights.to(x.device)
        super().add(x if weights is None else x.float() * weights.sqrt().unsqueeze(1))
        if self.wants_size:
            sizes = x.abs().double() if weights is None else x.abs().double() * weights.unsqueeze(1)
            self.sizes = sizes.sum(0) if self.sizes is None else self.sizes + sizes.sum(0)
        self.made.clear()

    def join(self, like: Tensor) -> None:
        super().join(like)
        if not self.tokens:
            return
        self.made["hessian"], self.lower = self.hessian, None       # only the float32 Hessian is used from here on
        if self.wants_size:
            own = like.new_zeros(like.shape[1], dtype=torch.float64) if self.sizes is None else self.sizes
            self.sizes = self.ranks.sum_(own)

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """q, k and v read one input: compute `make()` for the first of them, reuse it for the rest."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@dataclass(frozen=True)
class Inputs:
    """The statistics to collect of the inputs of each weight.

    kind: "none"; "peak"; "moments": Moments, summed over all tokens of all processes; "rows": the tokens themselves,
    of all processes, [N, in] for each batch. size: mean |x| beside the moments; peak: the largest one. token_weights:
    how much each real token of each batch counts in the moments ([N] per batch), given a visit of this process's rows
    and the run; None: all alike. dense: what is missing in the inputs beside the moments, and with "residual" in the
    stream that the outputs are added to; of weights that are edited.

    min_tokens: an expert that was sent fewer is given all tokens of its layer, as all are with all_experts.
    """

    kind: Literal["none", "peak", "moments", "rows"] = "none"
    size: bool = False
    peak: bool = False
    token_weights: Callable[[Visit, Run], list[Tensor] | None] | None = None
    dense: Literal["none", "inputs", "residual"] = "none"
    min_tokens: int = 0
    all_experts: bool = False


Seen = Moments | Peak | list[Tensor] | None


def each_weight(model: nn.Module, run: Run, names: Collection[str], label: str, inputs: Inputs = Inputs(),    # noqa: B008
                edits: bool = True) -> Iterator[tuple[Projection, Seen]]:
    """The weights in `names`, block by block, each with what was collected of its inputs.

    Each group of a block sees what the caller has made of the groups and blocks before it. edits, and what a resumed
    run passes over: as in walk.each.
    """
    if inputs.kind == "none":
        for block in each(model, run, label, edits):
            yield from ((p, None) for group in block.weights() for p in group if p.name in names)
        return
    if inputs.dense != "none" and edits:                # else both streams are one
        stops = visits_beside(model, run, label, lambda b: places(b, names, inputs.dense == "residual"))
    else:
        stops = visits(model, run, label, edits, shared=True)
    for visit in stops:
        yield from weights_of(visit, run, names, inputs)


def weights_of(visit: Visit, run: Run, names: Collection[str], inputs: Inputs) -> Iterator[tuple[Projection, Seen]]:
    """The weights in `names` of one visited block, each with what was collected of its inputs."""
    weights = inputs.token_weights(visit, run) if inputs.token_weights and inputs.kind != "none" else None
    for group in visit.block.groups():
        if chosen := [p for p in group if p.name in names]:
            seen = None if inputs.kind == "none" else _rows(visit, group[0], run) if inputs.kind == "rows" else \
                moments_of(visit, group[0], inputs, weights, run)
            yield from ((p, seen) for p in chosen)
    if inputs.kind == "moments":
        yield from _of_experts(visit, run, names, inputs, weights)
    elif inputs.kind == "none":
        yield from ((p, None) for p in visit.block.of_experts() if p.name in names)


def moments_of(visit: Visit, reader: Projection, inputs: Inputs, weights: list[Tensor] | None,
               run: Run) -> Moments | Peak:
    """What is collected of a group's input in front of the block as it is, over all processes of the run."""
    found = Peak(run.ranks) if inputs.kind == "peak" else Moments(run.ranks, inputs.size)
    shares, seen, readers = iter(weights or ()), [found], {}
    if inputs.peak and inputs.kind == "moments":
        found.largest = Peak(run.ranks)
        seen.append(found.largest)
    if visit.dense is not None:
        found.missing = Missing(visit, reader, inputs.dense == "residual", run.ranks)
        readers = dict.fromkeys(found.missing.stream, found.missing.see_stream)
        seen.append(found.missing)

    def see(x: Tensor) -> None:
        weight = next(shares, None)
        for one in seen:
            one.add(x, weight)

    visit.observe(readers | {reader.name: see}, found.missing.stream if readers else None)
    for one in seen:
        one.join(reader.weight)
    return found


def _of_experts(visit: Visit, run: Run, names: Collection[str], inputs: Inputs,
                weights: list[Tensor] | None) -> Iterator[tuple[Projection, Moments]]:
    """The experts' matrices in `names`, one expert after the other, each with the moments of what it reads.

    Their `told`: how many tokens the expert was sent, and whether it shares those of the layer for want of its own.
    """
    chosen = {(p.expert, p.parameter): p for p in visit.block.of_experts() if p.name in names}
    if not chosen:
        return
    routing, layer = Routing(visit, run), {}
    for expert in range(routing.experts.count):
        shares = inputs.all_experts or routing.shares(expert, inputs.min_tokens)
        own: dict[int, Moments] = {}
        for stack in stacks_of(routing.experts):
            projection = chosen.get((expert, stack.parameter))
            if projection is None:
                continue
            found = layer if shares and stack.step == 0 else own        # what all experts read alike: once
            if stack.step not in found:
                moments = found[stack.step] = Moments(run.ranks, inputs.size)
                for x, share in routing.read(expert, stack.parameter, shares, weights):
                    moments.add(x, share)
                moments.join(projection.weight)
            seen = copy.copy(found[stack.step])             # which shares all that is made of them
            seen.told = {"tokens": routing.sent[expert], "shared": shares and not inputs.all_experts}
            yield projection, seen


def _rows(visit: Visit, reader: Projection, run: Run) -> list[Tensor]:
    """The reader's inputs from every batch of all processes, in the order of the data; held as activations are."""
    own, hold = [], run.memory.keeper()
    visit.observe({reader.name: lambda x: own.append(hold(x.clone()))})
    return [x if mine else hold(x) for x, mine in run.ranks.each_of(own, reader.weight)]
