"""After the sweep: scales by least squares for the codes, codes by coordinate descent for the scales, in turns.

    loss of a row   e H e^T,  e = w - s (c - z),  of the undamped Hessian H
    scales          s += d,   (N + 1e-6 mean(diag N) I) d = b,   N_gh = c_g H_gh c_h^T,   b_g = c_g (H e^T)_g
    codes           twice, column i by falling H_ii:   c_i = the code nearest to v_i + (H e^T)_i / H_ii,  v_i its value

A row takes what it is given, scales rounded to the stored type, only if it loses less by it. Coordinate descent on
codes: Nair and Suggala, CDQuant (arXiv:2406.17542); the scales of a whole row at once and the turns are ours. Left out:
new zero points. Entries that are to stay 0 (zeros.py) are passed over. Scales stay as they are where they are no plain
numbers of the model's type (floats), and in rows of more than 1,024 groups, whose equations would cost more than all
else.
"""
from dataclasses import replace

import torch
from torch import Tensor

from llmopt.model.codes import Quantized
from llmopt.quant.grid import Spec, encode, quantized, value
from llmopt.quant.search import usable

DESCENTS, BLOCK = 2, 64
GROUPS, RIDGE = 1024, 1e-6
PART = 1 << 18          # entries of rows whose equations are made together


def alternate(solved: Quantized, weight: Tensor, hessian: Tensor, spec: Spec, rounds: int) -> Quantized:
    """`solved`, with less loss in every row [out] of `weight` [out, in] that can have less; its figure `loss` anew."""
    falling = hessian.diagonal().argsort(descending=True, stable=True)
    inner = hessian.index_select(0, falling).index_select(1, falling)
    slope, loss = _loss(solved, weight, hessian, spec)
    for _ in range(rounds):
        for step in (lambda now, slope: refit(now, hessian, slope, spec),
                     lambda now, slope: descend(now, inner, slope[:, falling], falling, spec)):
            trial = step(solved, slope)
            after, less = _loss(trial, weight, hessian, spec)
            better = less < loss
            solved = _rows(better, trial, solved)
            slope, loss = torch.where(better[:, None], after, slope), torch.where(better, less, loss)
    solved.figures["loss"] = float(loss.sum() / 2)
    return solved


def refit(solved: Quantized, hessian: Tensor, slope: Tensor, spec: Spec) -> Quantized:
    """The same codes with the scales that suit them best; slope: H e^T of each row [out, in]."""
    count = solved.scales.shape[1]
    if spec.form.is_float or count > GROUPS:
        return solved
    steps = spec.form.numbers(solved.codes)
    if solved.groups is not None:                                    # the columns of a group side by side
        order = solved.groups.argsort(stable=True)
        steps, slope, hessian = steps[:, order], slope[:, order], hessian[order][:, order]
    if solved.zeros is not None:
        steps = steps - solved.zeros.float().repeat_interleave(steps.shape[1] // count, 1)
    rows = max(1, min(PART // steps.shape[1], PART // count ** 2))
    moved = torch.cat([_solve(some, hessian, of, count)
                       for some, of in zip(steps.split(rows), slope.split(rows), strict=True)])
    return replace(solved, scales=usable(solved.scales.float() + moved, solved.scales, spec))


def _solve(steps: Tensor, hessian: Tensor, slope: Tensor, count: int) -> Tensor:
    """d [rows, groups] of the module's docstring; 0 in a row whose equations have no answer."""
    width = steps.shape[1] // count
    matrix = steps.new_zeros(len(steps), count, count)               # N, from the diagonal down
    for g in range(count):
        own, far = slice(g * width, (g + 1) * width), (g + 1) * width
        matrix[:, g, :g + 1] = ((steps[:, own] @ hessian[own, :far]) * steps[:, :far]).unflatten(1, (-1, width)).sum(-1)
    wanted = (steps * slope).unflatten(1, (count, width)).sum(-1, keepdim=True)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(RIDGE * diagonal.mean(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(wanted, factor)[..., 0]
    return torch.where((failed == 0)[:, None] & found.isfinite(), found, 0)


def descend(solved: Quantized, hessian: Tensor, slope: Tensor, order: Tensor, spec: Spec) -> Quantized:
    """The codes moved one by one, columns in `order`; hessian [in, in] and slope [out, in] are in that order."""
    width = spec.width(len(order))
    of = torch.arange(len(order), device=order.device) // width if solved.groups is None else solved.groups
    state = _Descent(solved, slope.T.contiguous(), order, spec)
    for _ in range(DESCENTS):
        for start in range(0, len(order), BLOCK):
            state.block(slice(start, min(start + BLOCK, len(order))), hessian, of[order[start:start + BLOCK]].tolist())
    codes = state.numbers[order.argsort()].T.contiguous()
    made = quantized(codes, solved.scales, solved.zeros, spec, solved.groups)
    return replace(made, figures=solved.figures)


class _Descent:
    """Numbers, values and slopes, transposed: a column is a row, [in, out] in the order of the descent."""

    def __init__(self, solved: Quantized, slope: Tensor, order: Tensor, spec: Spec):
        self.spec, self.slope = spec, slope
        self.numbers = spec.form.numbers(solved.codes).T[order].contiguous()
        self.values = solved.dequantize(spec.dtype).float().T[order].contiguous()
        self.scales = solved.scales.T.contiguous()                                   # [groups, out]
        self.zeros = None if solved.zeros is None else solved.zeros.T.contiguous()
        self.live = None if spec.live is None else spec.live.T[order].contiguous()

    def block(self, place: slice, hessian: Tensor, groups: list[int]) -> None:
        """Move the codes of some columns, and then the slopes of all."""
        slope, inner = self.slope[place].clone(), hessian[place, place]
        before, diagonal = self.values[place].clone(), inner.diagonal().tolist()
        for i, group in enumerate(groups):
            if diagonal[i] > 0:                                      # else its input is always 0
                made = self._column(place.start + i, slope[i] / diagonal[i], group)
                slope[i + 1:].addcmul_(inner[i, i + 1:, None], made - before[i], value=-1)
        self.slope.addmm_(hessian[:, place], self.values[place] - before, alpha=-1)

    def _column(self, i: int, wanted: Tensor, group: int) -> Tensor:
        """The values [out] of one column after a change that is as near as can be to the wanted one."""
        scale, zero = self.scales[group], None if self.zeros is None else self.zeros[group]
        wanted.add_(self.values[i])
        if self.live is not None:
            wanted.mul_(self.live[i])
        numbers = self.numbers[i] = encode(wanted, scale, zero, self.spec)
        made = self.values[i] = value(numbers, scale, zero, self.spec)
        return made


def _loss(solved: Quantized, weight: Tensor, hessian: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """(H e^T [out, in], e H e^T [out]) of each row."""
    apart = weight - solved.dequantize(spec.dtype).float()
    slope = apart @ hessian
    return slope, (apart * slope).sum(1)


def _rows(better: Tensor, new: Quantized, old: Quantized) -> Quantized:
    """The rows of `new` where it is better [out], else those of `old`."""
    return replace(old, codes=torch.where(better[:, None], new.codes, old.codes),
                   scales=torch.where(better[:, None], new.scales, old.scales))
