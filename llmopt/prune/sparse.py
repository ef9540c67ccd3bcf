"""Single weights become 0, and the shapes stay: `units: [weights]` of the criteria that can.

What it does not save: as many bytes and operations as before. With `pattern`, NVIDIA GPUs from Ampere on multiply 2:4
faster in engines that pack it; nothing else does.

Every weight is masked by what it reads behind all that was masked before it (in the papers of Wanda and SparseGPT:
behind the blocks before it). With `refit` what stays is then fitted to what the whole weight wrote of the same inputs,
by conjugate gradients (masks.py), where that is better on tokens held out; a bias takes part.
"""
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import pad

from llmopt.calibration.second_moments import Gram
from llmopt.calibration.walk import Visit, each, visits
from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Projection, blocks, spec_of
from llmopt.model.finite import all_finite
from llmopt.parts import Several
from llmopt.prune.base import LOSES_MORE, ByBlock, Unit
from llmopt.prune.budgets import Parameters
from llmopt.prune.masks import comparable, counts_below, fitted, half_of_each, smallest
from llmopt.prune.refit import Sums, best, held_out, with_bias
from llmopt.prune.scopes import Lamp, Local, Scope
from llmopt.scale.processes import Ranks

RIDGES = (0.01, 0.1)            # of the refit
SAVES_NOTHING = "as many bytes and operations as before"
FASTER = ", unless an engine packs the pattern for GPUs that multiply it (2:4: NVIDIA from Ampere on)"


@plain_dataclass(frozen=True)
class Gone:
    """What of a weight [out, in] becomes 0: `count` entries, or half of every `group` inputs of a row."""

    count: int
    group: int | None = None

    def of_rows(self, scores: Tensor) -> Tensor:
        """The smallest of each row of `scores` [out, in], of all rows as many."""
        return half_of_each(scores, self.group) if self.group else smallest(scores, self.count // len(scores))

    def of_all(self, scores: Tensor) -> Tensor:
        """The smallest of all `scores` [out, in]."""
        if self.group:
            return half_of_each(scores, self.group)
        return smallest(scores.flatten(), self.count).view_as(scores)


@dataclass(frozen=True)
class Sparse(ByBlock):
    """A criterion writes `zeroed`; looks: what of the inputs it sees, sum_t x_t^2 [in] or sum_t x_t x_t^T [in, in]."""

    looks: ClassVar[Literal["nothing", "squares", "gram"]] = "nothing"
    weight_scopes: ClassVar[tuple[type[Scope], ...]] = (Local,)

    units: Several[Literal[Unit, "weights"]] = Field(
        ("ffn", "kv_groups"), description="what may leave; weights: single ones become 0, which saves neither bytes "
                                          "nor time")
    pattern: Literal["2:4", "4:8"] | None = Field(
        None, description="units: [weights]: two of every four inputs of a row become 0, or four of eight; ratio: 0.5")

    @property
    def single(self) -> bool:
        """True if single weights become 0."""
        return "weights" in self.units

    def check(self) -> None:
        if not self.single:
            if self.pattern:
                raise FieldError("pattern", self.pattern, "null, or units: [weights]")
            super().check()
        else:
            self._check_single()

    def _check_single(self) -> None:
        if len(self.units) > 1:
            raise FieldError("units", list(self.units), "[weights] alone; use two steps to have both")
        if not isinstance(self.scope, self.weight_scopes):
            names = " or ".join(scope.name for scope in self.weight_scopes)
            raise FieldError("scope", self.scope.name, f"{names}, as {self.name} compares single weights")
        if not isinstance(self.budget, Parameters):
            raise FieldError("budget", self.budget.name, "parameters: zeros among weights save neither flops nor time")
        if self.pattern and self.ratio != 0.5:
            raise FieldError("ratio", self.ratio, f"0.5, as pattern {self.pattern} is half of the weights")
        if self.pattern and not isinstance(self.scope, Local):
            raise FieldError("scope", self.scope.name, f"local: pattern {self.pattern} takes as many from every row")

    @abstractmethod
    def zeroed(self, weight: Tensor, seen: Tensor | None, gone: Gone) -> tuple[Tensor, Tensor]:
        """(the weight with zeros, where it has them [out, in] bool). weight: [out, in] float32, left as it is."""

    def notes(self, run: Run) -> list[str]:
        if not self.single:
            return super().notes(run)
        found = [SAVES_NOTHING + FASTER * bool(self.pattern)]
        found += [] if self.refit else [LOSES_MORE]
        fills = [step.name for step in run.ahead if fills_zeros(step, self.ratio)]
        return found + ([f"behind it, {', '.join(fills)} will fill zeros again"] if fills else [])

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        if not self.single:
            return super().sketch(skeleton, run, source)
        sizes = self._sizes(skeleton)
        what = f", {self.pattern}" if self.pattern else ""
        note = f" ({note})" if (note := spec_of(skeleton).note) else ""
        return "; ".join([f"zeroes {self.ratio:.1%} of {len(sizes)} weights{what}{note}", *self.notes(run)])

    def apply(self, model: nn.Module, run: Run) -> Record:
        if not self.single:
            return super().apply(model, run)
        sizes = self._sizes(model)
        self.check_data(run)
        counts = run.memory.remember("zeros", lambda: {"counts": self._shares(model, run, sizes)})["counts"]
        group = int(self.pattern.partition(":")[2]) if self.pattern else None
        found = self._zero(model, run, {name: Gone(count, group) for name, count in counts.items()}) if any(
            counts.values()) else []
        share = sum(one["zeros"] for one in found) / sum(out * width for out, width in sizes.values())
        self.tell(run)
        return Record(meta={"ratio": self.ratio, "removed_share": share, "notes": self.notes(run), "weights": found})

    def _sizes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """(out, in) of each weight; raises LlmoptError where the fields do not fit them."""
        sizes = {p.name: (p.out_features, p.in_features) for block in blocks(model) for p in block.projections()}
        group = int(self.pattern.partition(":")[2]) if self.pattern else 1
        for name, (_, width) in sizes.items():
            if width % group:
                raise LlmoptError(f"{name}: its {width} inputs are no multiple of {group}, as pattern {self.pattern} "
                                  "needs")
        if self.ratio > 1 - self.minimum:
            raise BudgetError(f"ratio {self.ratio:g} cannot be met: minimum {self.minimum:g} leaves at most "
                              f"{1 - self.minimum:.3f} of every weight to zero")
        return sizes

    @torch.no_grad()
    def _shares(self, model: nn.Module, run: Run, sizes: dict[str, tuple[int, int]]) -> dict[str, int]:
        """Entries of each weight that become 0."""
        if isinstance(self.scope, Local):
            return {name: int(self.ratio * out * width + 1e-9) for name, (out, width) in sizes.items()}
        how = "lamp" if isinstance(self.scope, Lamp) else self.normalize

        def scores() -> Iterator[Tensor]:
            for block in each(model, run, f"{self.name} ranking", edits=False):
                for projection in block.projections():
                    yield comparable(finite(projection).abs(), how)

        return dict(zip(sizes, counts_below(scores, self.ratio, self.minimum), strict=True))

    @torch.no_grad()
    def _zero(self, model: nn.Module, run: Run, gone: dict[str, Gone]) -> list[dict[str, Any]]:
        """Mask every weight, block after block; figures of each."""
        figures: dict[int, list] = {}
        walk = visits(model, run, self.name, shared=True) if self.needs_data else each(model, run, self.name)
        for stop in walk:
            block, visit = (stop.block, stop) if self.needs_data else (stop, None)
            apart = held_out(visit.masks, run.ranks) if visit else []
            found = [one for group in block.groups() for one in self._group(group, visit, apart, run, gone)]
            figures[block.index] = run.memory.remember(f"zeros {block.index}", lambda known=found: {
                "weights": known})["weights"]
        return [one for block in blocks(model) for one in (figures[block.index] if block.index in figures else
                run.memory.remember(f"zeros {block.index}", lambda: {"weights": []})["weights"])]

    def _group(self, group: list[Projection], visit: Visit | None, apart: list[Tensor], run: Run,
               gone: dict[str, Gone]) -> list[dict[str, Any]]:
        """Mask the weights that read one input, and fit what stays; figures of each."""
        sums = Sums(apart, run.ranks, int(group[0].bias is not None)) if self.refit else None
        seen = self._seen(group[0], visit, sums, run)
        weights = [finite(projection) for projection in group]
        masked = [self.zeroed(weight, seen, gone[p.name]) for p, weight in zip(group, weights, strict=True)]
        found = [{"name": p.name, "zeros": int(out.sum())} for p, (_, out) in zip(group, masked, strict=True)]
        made, seen = [values for values, _ in masked], None
        if sums:
            fits = [Fit(p, weight, *one) for p, weight, one in zip(group, weights, masked, strict=True)]
            ridges = [fit.ridge(sums) for fit in fits]
            gram = sums.settled()
            made = [fit.solved(gram, ridge) for fit, (ridge, _) in zip(fits, ridges, strict=True)]
            found = [one | {"ridge": ridge, **lost} for one, (ridge, lost) in zip(found, ridges, strict=True)]
        for projection, values in zip(group, made, strict=True):
            width, values = projection.in_features, run.ranks.broadcast_(values.to(projection.weight.dtype))
            if not all_finite(values):
                raise LlmoptError(f"{projection.name}: cannot be masked: what it reads on the calibration data is not "
                                  "finite")
            projection.write(values[:, :width])
            if values.shape[1] > width:
                projection.bias.copy_(values[:, -1])
        return found

    def _seen(self, projection: Projection, visit: Visit | None, sums: Sums | None, run: Run) -> Tensor | None:
        """What `zeroed` looks at, of all processes; into `sums` goes what the fit needs."""
        if visit is None:
            return None
        watch = sums or (Gram(run.ranks) if self.looks == "gram" else Energy(run.ranks))
        visit.observe({projection.name: watch.add})
        gram, width = sums.gram if sums else watch, projection.in_features
        gram.join(projection.weight.new_zeros(1, width + (sums.constant if sums else 0), dtype=torch.float32))
        if not gram.tokens:
            raise LlmoptError(f"{projection.name}: no calibration token reached it")
        if self.looks == "nothing":
            return None
        found = gram.whole() if isinstance(gram, Gram) else gram.sum
        if found.dim() == 2 and self.looks == "squares":
            found = found.diagonal()
        return found[:width] if found.dim() == 1 else found[:width, :width]


def fills_zeros(step: Method, share: float) -> bool:
    """Does a step make other numbers of zeros, such a share of each weight: a rotation of all, a solver of some?"""
    keeps = getattr(step, "keeps_zeros_of", None)
    return step.name == "transform.rotate" or (keeps is not None and not keeps(share))


class Energy:
    """sum_t x_t^2 [in], float64, over the tokens of all processes."""

    def __init__(self, ranks: Ranks):
        self.tokens, self.sum, self.ranks = 0, 0.0, ranks

    def add(self, x: Tensor) -> None:
        """Take in `x` [N, in]."""
        self.tokens, self.sum = self.tokens + len(x), self.sum + x.double().square_().sum(0)

    def join(self, like: Tensor) -> None:
        """Take in what the other ranks have seen."""
        self.tokens = sum(self.ranks.gather(self.tokens))
        self.sum = self.ranks.sum_(self.sum + torch.zeros(like.shape[1], dtype=torch.float64, device=like.device))


class Fit:
    """The weights of a projection that stay, on the way to what the whole one writes; a bias is one more column."""

    def __init__(self, projection: Projection, weight: Tensor, made: Tensor, out: Tensor):
        self.stays, self.start, self.target = ~out, made, weight
        if projection.bias is not None:
            self.stays, self.target = pad(self.stays, (0, 1), value=True), with_bias(projection)
            self.start = torch.cat([made, self.target[:, -1:]], 1)

    def ridge(self, sums: Sums) -> tuple[float | None, dict[str, float]]:
        """The ridge that does best on what is held out, None for no fit; see refit.best."""
        gram = sums.gram.whole()
        return best(self.target, self.start, lambda ridge: self.solved(gram, ridge), RIDGES, sums)

    def solved(self, gram: Tensor, ridge: float | None) -> Tensor:
        """[out, in], with the bias behind it."""
        return self.start if ridge is None else fitted(self.start, self.stays, self.target, gram, ridge)


def finite(projection: Projection) -> Tensor:
    """The weight [out, in] in float32; raises LlmoptError where it is none."""
    weight = projection.weight.float()
    if not all_finite(weight):
        raise LlmoptError(f"{projection.name}: the weight holds NaN or Inf, so nothing in it can be compared")
    return weight
