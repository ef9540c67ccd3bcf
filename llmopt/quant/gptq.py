"""GPTQ: round one input column at a time and let the columns that follow make up for the error.

    H = (2/N) sum_t x_t x_t^T + damping mean(diag H) I,      U^T U = H^-1  (U upper triangular)
    for column i:  q_i = round(w_i),   e_i = (w_i - q_i) / U_ii,   w_j -= e_i U_ij  for all j > i
    loss = sum_i |e_i|^2 / 2 = tr((W - Q) H (W - Q)^T) / 2

act_order takes the columns by falling diag H; static_groups fixes the scales of the original column groups beforehand,
so that any order can be stored. Without static_groups a group's scale is fitted to the CURRENT values of its columns
when the sweep reaches it. Columns whose input is always 0 are set to 0. A matrix that no damping up to 1 makes
invertible is rounded to nearest, which `figures` then says. Frantar et al., 2022 (arXiv:2210.17323).
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmopt.method import FieldError, LlmoptError, register
from llmopt.quant.base import Quantizer, Stats
from llmopt.quant.grid import Quantized, Spec, as_codes, decode, encode, fit, fit_groups, round_to_nearest

MAX_DAMPING = 1.0


@register("quant.gptq")
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """Optimal-brain quantization with a fixed column order."""

    uses_inputs: ClassVar[bool] = True

    act_order: bool = True        # columns with the largest inputs first
    static_groups: bool = True    # scales of the original column groups, fixed before the sweep
    damping: float = 0.01         # share of the mean diagonal added to the Hessian
    block: int = 128              # columns whose updates to the rest are applied together; does not change the result

    def check(self) -> None:
        super().check()
        if not 0 <= self.damping <= MAX_DAMPING:
            raise FieldError("damping", self.damping, "a share from 0 to 1")
        if self.block < 1:
            raise FieldError("block", self.block, "at least one column")

    def quantize(self, weight: Tensor, stats: Stats, spec: Spec) -> Quantized:
        if stats.hessian is None:
            raise LlmoptError("no calibration token reached this weight")
        if not stats.hessian.isfinite().all():
            raise LlmoptError("its calibration inputs overflow (NaN or infinite Hessian): load the model in bfloat16 "
                              "or float32")
        hessian = stats.hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        falling = hessian.diagonal().argsort(descending=True, stable=True)
        order = falling if self.act_order else torch.arange(len(hessian), device=hessian.device)
        factor, damping = inverse_factor(hessian[order][:, order], self.damping)
        if factor is None:
            result = round_to_nearest(weight, spec)
            result.figures["note"] = "rounded to nearest: the Hessian is singular at every damping up to 1"
            return result
        result = Sweep(weight, factor, order, spec, self.static_groups or spec.group_size == -1).run(self.block)
        result.figures |= {"dead_columns": int(dead.sum()), "damping": damping}
        return result


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """(U, damping used) with U^T U = (H + damping mean(diag H) I)^-1; more damping until it exists, or (None, last)."""
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper, damping
        if damping >= MAX_DAMPING:
            return None, damping
        damping = min(MAX_DAMPING, max(10 * damping, 1e-3))


class Sweep:
    """One pass over the columns of `weight` [out, in], taken in `order`."""

    def __init__(self, weight: Tensor, factor: Tensor, order: Tensor, spec: Spec, fixed: bool):
        self.width = spec.width(weight.shape[1])
        self.spec, self.factor, self.order, self.fixed = spec, factor, order, fixed
        self.scales, self.zeros = fit_groups(weight, spec)           # refitted on the way, unless fixed
        self.weight = weight[:, order]
        place = torch.arange(len(order), device=order.device)
        self.groups = (order if fixed else place) // self.width      # of each column in the order of the sweep
        self.codes = torch.empty_like(self.weight)
        self.loss = 0.0

    def run(self, block: int) -> Quantized:
        if not self.fixed:                                           # a group must not straddle two blocks
            block = max(1, block // self.width) * self.width
        for start in range(0, len(self.order), block):
            stop = min(start + block, len(self.order))
            errors = self._columns(start, stop)
            self.weight[:, stop:] -= errors @ self.factor[start:stop, stop:]
        back = self.order.argsort()
        groups = self.groups[back]
        plain = torch.equal(groups, torch.arange(len(back), device=back.device) // self.width)
        return Quantized(as_codes(self.codes[:, back], self.spec.bits), self.scales, self.spec.bits,
                         self.spec.group_size, self.zeros, None if plain else groups, {"loss": float(self.loss)})

    def _columns(self, start: int, stop: int) -> Tensor:
        """Round the columns of one block; their errors [out, block], each over its diagonal entry of U."""
        now = self.weight[:, start:stop].clone()
        errors = torch.empty_like(now)
        for i, column in enumerate(range(start, stop)):
            if not self.fixed and column % self.width == 0:
                self._refit(column // self.width, now[:, i:i + self.width])
            group, row = int(self.groups[column]), self.factor[column, column:stop]
            scale, zero = self.scales[:, group], None if self.zeros is None else self.zeros[:, group]
            code = encode(now[:, i], scale, zero, self.spec)
            errors[:, i] = (now[:, i] - decode(code, scale, zero, self.spec.dtype).float()) / row[0]
            now[:, i:] -= errors[:, i, None] * row
            self.codes[:, column] = code
        self.loss += errors.square().sum() / 2
        return errors

    def _refit(self, group: int, columns: Tensor) -> None:
        scale, zero = fit(columns, self.spec)
        self.scales[:, group] = scale[:, 0]
        if zero is not None:
            self.zeros[:, group] = zero[:, 0]
