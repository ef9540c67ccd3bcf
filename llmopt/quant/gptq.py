"""GPTQ: round one input column at a time and let the columns that follow make up for the error.

    H = (2/N) sum_t x_t x_t^T + damping mean(diag H) I,      U^T U = H^-1  (U upper triangular)
    for column i:  q_i = round(w_i),   e_i = (w_i - q_i) / U_ii,   w_j -= e_i U_ij  for all j > i
    loss = tr((W - Q) H (W - Q)^T) / 2                      (of the undamped H; without damping it is sum_i |e_i|^2 / 2)

targets: dense aims at what the unedited model writes at this place, from its own inputs x~ and, at the two writers of a
block, beside its own residual stream r~: by least squares over the tokens that is the weight

    W + (W sum_t (x~_t - x_t) x_t^T + sum_t (r~_t - r_t) x_t^T) (H + ridge mean(diag H) I)^-1           (missing.py)

whose first sum is GPTAQ's (Li et al., 2025, arXiv:2504.02692). Every such fit takes away more of what is missing at the
calibration tokens than at others, and all fits of a model together have more numbers than there are tokens: hence a
larger ridge than GPTQ's damping. The loss, and the figure `output_error`, are those of the distance to this weight.
Scales are searched for what the errors of a group do to the outputs (search.py), and may be negative (grid.py). After
the sweep scales and codes are improved in turns (alternate.py).

Entries that are to stay 0 (zeros.py) get the code of 0: their e_i is all that they have come to by then, and what
follows takes it. (SparseGPT's way. To send them nothing lost a seventh more on SmolLM2 with a 2:4 pattern.)

act_order takes the columns by falling diag H; static_groups fixes the scales of the original column groups beforehand,
so that any order can be stored. Without static_groups a group's scale is fitted to the CURRENT values of its columns
when the sweep reaches it. Columns whose input is always 0 are set to 0. Rounded to nearest instead, and counted in
`figures`: rows that the sweep, being greedy, makes worse, and a matrix that no damping up to 1 makes invertible.
Frantar et al., 2022 (arXiv:2210.17323).
"""
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.factor import MAX_DAMPING, inverse_factor, times_inverse
from llmopt.calibration.inputs import Moments
from llmopt.calibration.second_moments import row_errors
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.alternate import alternate
from llmopt.quant.base import Quantizer
from llmopt.quant.grid import Grid, Spec, encode, fit, nearest, quantized, round_to_nearest, value
from llmopt.quant.search import fit_outputs, fit_to, hessian_of
from llmopt.quant.solver import Solver
from llmopt.quant.tokens import Alike, TokenWeights

Refit = Callable[[int, Tensor], Grid]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Shared by all weights that read one input: the order of their columns [in], U in that order [in, in]."""

    order: Tensor
    dead: Tensor                # [in] bool: columns whose input is always 0
    factor: Tensor | None       # None: the Hessian is singular
    damping: float              # the share used in the end


@register("gptq")
@dataclass(frozen=True)
class ColumnSweep(Solver):
    """Optimal-brain quantization with a fixed column order."""

    inputs: ClassVar = "moments"
    rowwise: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]] = ("loss", "rounded_rows")

    act_order: bool = Field(True, description="columns with the largest inputs first")
    static_groups: bool = Field(True, description="scales of the original column groups, fixed before the sweep")
    damping: float = Field(0.03, ge=0, le=MAX_DAMPING, description="share of the mean diagonal added to the Hessian")
    block: int = Field(128, ge=1, description="columns whose updates are applied together; the result is the same")
    tokens: TokenWeights = Field(Alike(), description="how much each token of the calibration data counts in H")
    signed: bool = Field(True, description="symmetric scales may be negative: the one code that a side has more is "
                                           "put where the large weights are")
    search: Literal["outputs", "weights"] = Field("outputs", description="whose errors the scales are searched for: of "
                                                  "the group's outputs, or of its weights (norm 2.4); see clip")
    sweeps: int = Field(2, ge=0, le=100, description="turns afterwards: scales by least squares, then codes one by one")

    targets: Literal["dense", "weights"] = Field("dense", description="what is to be met: what the dense model "
                                                 "writes, or what its weights make of the inputs that there are")
    residual: bool = Field(True, description="dense targets of o_proj and down_proj count the residual stream in")
    ridge: float = Field(0.3, ge=0, description="share of the mean diagonal added to the Hessian where dense targets "
                                                "are fitted: the less data, the more")

    @property
    def dense(self) -> Literal["none", "inputs", "residual"]:
        return "none" if self.targets == "weights" else "residual" if self.residual else "inputs"

    def token_weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        return self.tokens.weights(visit, run)

    def quantize(self, weight: Tensor, moments: Moments, spec: Spec) -> Quantized:
        made = moments.cached((self.act_order, self.damping), lambda: self.prepare(moments))
        weight[:, made.dead] = 0
        if made.factor is None:
            rounded = round_to_nearest(weight, spec)
            rounded.figures["note"] = "rounded to nearest: the Hessian is singular at every damping up to 1"
            return rounded
        weight += pull(weight, moments, self.ridge)
        spec = dataclasses.replace(spec, signed=self.signed)
        searched, lively = moments.hessian if self.search == "outputs" else None, weight
        if spec.live is not None:
            lively = weight * spec.live
        rounded = nearest(lively, fit_to(lively, searched, spec), spec)
        sweep = Sweep(weight[:, made.order], made.factor, made.order, rounded, spec)
        fixed = self.static_groups or spec.group_size == -1
        result = sweep.run(self.block, None if fixed else self._refit(made, moments.hessian, spec))
        result.figures |= {"dead_columns": int(made.dead.sum()), "damping": made.damping}
        result = best_rows(result, rounded, weight, moments.hessian, spec)
        return alternate(result, weight, moments.hessian, spec, self.sweeps) if self.sweeps else result

    def _refit(self, made: Prepared, hessian: Tensor, spec: Spec) -> Refit:
        """What gives columns [out, width] of the sweep, from a place on, scales of their own."""
        def refit(start: int, columns: Tensor) -> Grid:
            if self.search == "weights" or spec.form.rows != 1:
                return fit(columns, spec)
            of = made.order[start:start + columns.shape[1]]
            return fit_outputs(columns, hessian[of][:, of], spec)

        return refit

    def prepare(self, stats: Moments) -> Prepared:
        """Order and factor; raises LlmoptError for inputs that were never there or are not finite."""
        whole = hessian_of(stats)
        diagonal = whole.diagonal()
        dead = diagonal == 0
        falling = diagonal.argsort(descending=True, stable=True)
        order = falling if self.act_order else torch.arange(len(diagonal), device=diagonal.device)
        hessian = whole.index_select(0, order).index_select(1, order)
        hessian.diagonal()[dead[order]] = 1
        return Prepared(order, dead, *inverse_factor(hessian, self.damping, stats.ranks))


@register("quant.gptq")
@dataclass(frozen=True)
class GPTQ(ColumnSweep, Quantizer):
    """Optimal-brain quantization with a fixed column order."""

    kind = "method"


def pull(weight: Tensor, moments: Moments, ridge: float) -> Tensor | float:
    """What to add to these rows [out, in] of a weight so that they make up for what is missing at it; 0: nothing.

        (W M) (H + ridge)^-1  for a reader,  M (H + ridge)^-1  for a writer: least squares over the tokens
    """
    lack = moments.missing and moments.missing.matrix
    if lack is None:
        return 0.0
    if moments.missing.of_outputs:
        own = lack if len(lack) == len(weight) else moments.ranks.share(lack)
        return _solved(own, moments, ridge)
    return weight @ moments.cached(("pull", ridge), lambda: _solved(lack, moments, ridge))


def _solved(rows: Tensor, moments: Moments, ridge: float) -> Tensor:
    """`rows` (H + ridge)^-1, 0 for inputs that are always 0, and where no ridge up to 1 makes H invertible."""
    hessian = moments.hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    factor, _ = inverse_factor(hessian, ridge, moments.ranks)
    if factor is None:
        return torch.zeros_like(rows)
    found = times_inverse(rows, factor)
    found[:, dead] = 0
    return found


def best_rows(solved: Quantized, rounded: Quantized, weight: Tensor, hessian: Tensor, spec: Spec) -> Quantized:
    """`solved`, with the rows of `rounded` where those disturb the outputs less (the sweep is greedy: a few rows)."""
    figures, loss = solved.figures, row_errors(solved.dequantize(spec.dtype).float() - weight, hessian)
    if solved.groups is None:                                        # else the two do not share their groups
        other = row_errors(rounded.dequantize(spec.dtype).float() - weight, hessian)
        better = other < loss
        for mine, theirs in ((solved.codes, rounded.codes), (solved.scales, rounded.scales),
                             (solved.zeros, rounded.zeros)):
            if mine is not None:
                mine[better] = theirs[better]
        figures["rounded_rows"], loss = int(better.sum()), torch.minimum(loss, other)
    figures["loss"] = float(loss.sum() / 2)
    return solved


class Sweep:
    """One pass over the columns of `weight` [out, in], already in `order`; kept transposed: a column is a row."""

    def __init__(self, weight: Tensor, factor: Tensor, order: Tensor, start: Quantized, spec: Spec):
        self.factor, self.order, self.spec = factor, order, spec
        self.width = spec.width(len(order))
        self.weight = weight.T.contiguous()                                          # [in, out]
        self.codes = torch.empty_like(self.weight)
        self.scales = start.scales.T.contiguous()                                    # [groups, out]
        self.zeros = None if start.zeros is None else start.zeros.T.contiguous()
        self.live = None if spec.live is None else spec.live[:, order].T.contiguous()

    def run(self, block: int, refit: Refit | None) -> Quantized:
        """Solve; refit: for scales that are fitted on the way. None: those of the original column groups stay."""
        place = torch.arange(len(self.order), device=self.order.device)
        groups = (place if refit else self.order) // self.width      # of each column in the order of the sweep
        if refit:                                                # a group must not straddle two blocks
            block = max(1, block // self.width) * self.width
        for start in range(0, len(place), block):
            stop = min(start + block, len(place))
            errors = self._columns(start, groups[start:stop].tolist(), refit)
            self.weight[stop:].addmm_(self.factor[start:stop, stop:].T, errors, alpha=-1)
        back = self.order.argsort()
        zeros = None if self.zeros is None else self.zeros.T.contiguous()
        return quantized(self.codes[back].T.contiguous(), self.scales.T.contiguous(), zeros, self.spec,
                         None if torch.equal(groups[back], place // self.width) else groups[back])

    def _columns(self, start: int, groups: list[int], refit: Refit | None) -> Tensor:
        """Round the columns of one block; their errors [block, out], each over its diagonal entry of U."""
        stop = start + len(groups)
        now, factor = self.weight[start:stop], self.factor[start:stop, start:stop]
        errors, diagonal = torch.empty_like(now), factor.diagonal().tolist()
        for i, group in enumerate(groups):
            if refit and (start + i) % self.width == 0:
                self._take(group, *refit(start + i, self._lively(start + i, now[i:i + self.width]).T))
            scale, zero = self.scales[group], None if self.zeros is None else self.zeros[group]
            code = self.codes[start + i] = encode(self._lively(start + i, now[i:i + 1])[0], scale, zero, self.spec)
            errors[i] = (now[i] - value(code, scale, zero, self.spec)) / diagonal[i]
            now[i + 1:].addcmul_(factor[i, i + 1:, None], errors[i], value=-1)
        return errors

    def _lively(self, at: int, columns: Tensor) -> Tensor:
        """The columns from a place on [n, out], 0 where they are to be 0."""
        return columns if self.live is None else columns * self.live[at:at + len(columns)]

    def _take(self, group: int, scale: Tensor, zero: Tensor | None) -> None:
        self.scales[group] = scale[:, 0]
        if zero is not None:
            self.zeros[group] = zero[:, 0]
