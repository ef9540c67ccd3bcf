"""Scales searched for what the errors of their group do to the outputs, in the group's own block of the Hessian.

    e(s) = Q(w; s) - w of the columns of a group,        least  e H_gg e^T  over the steps of the range (grid.py)
    then once  s = (c H_gg w^T) / (c H_gg c^T),          least squares for the codes c that were found, if that is less

Of groups wider than 256 columns only the diagonal of H_gg counts: all of it would take as long as a hundred sweeps.
The steps are those of GPTQ's code (Frantar et al., arXiv:2210.17323), which counts |e|^2.4.
"""
from torch import Tensor, cat, stack, where

from llmopt.calibration.inputs import Moments
from llmopt.errors import LlmoptError
from llmopt.model.finite import all_finite
from llmopt.quant.grid import CHUNK, Error, Grid, Spec, encode, fit_at_once, fit_groups, off

WIDE = 256


def hessian_of(stats: Moments) -> Tensor:
    """The second moments [in, in]; raises LlmoptError for inputs that were never there or are not finite."""
    if stats.hessian is None:
        raise LlmoptError("no calibration token reached this weight")
    if not all_finite(stats.hessian):
        raise LlmoptError("its calibration inputs overflow (NaN or infinite Hessian): load the model in bfloat16 or "
                          "float32")
    return stats.hessian


def fit_to(weight: Tensor, hessian: Tensor | None, spec: Spec) -> Grid:
    """Scales and zero points [out, groups] of `weight` [out, in] float32, searched for its outputs.

    For the errors of its weights where there is no Hessian, or where rows share their scales.
    """
    return fit_groups(weight, spec) if hessian is None or spec.form.rows != 1 else fit_groups_to(weight, hessian, spec)


def fit_groups_to(weight: Tensor, hessian: Tensor, spec: Spec) -> Grid:
    """Scales and zero points [out, groups] of `weight` [out, in] float32."""
    width = spec.width(weight.shape[1])
    blocks = stack([hessian[at:at + width, at:at + width] for at in range(0, len(hessian), width)])
    rows = weight.unflatten(1, (-1, width)).transpose(0, 1)                                      # [groups, out, width]
    parts = [_fit_some(part, blocks, spec) for part in rows.split(max(1, CHUNK // width), 1)]
    scale, zero = (None if of[0] is None else cat(of, 1) for of in zip(*parts, strict=True))     # [groups, out, 1]
    return scale[..., 0].T, None if zero is None else zero[..., 0].T


def _fit_some(weight: Tensor, hessian: Tensor, spec: Spec) -> Grid:
    """Of as many groups at a time as stay in the processor's cache."""
    count = max(1, CHUNK // weight[0].numel())
    found = [fit_outputs(some, of, spec) for some, of in zip(weight.split(count), hessian.split(count), strict=True)]
    scale, zero = (None if parts[0] is None else cat(parts) for parts in zip(*found, strict=True))
    return scale, zero


def fit_outputs(weight: Tensor, hessian: Tensor, spec: Spec) -> Grid:
    """Scale and zero point [..., out, 1] of groups of columns [..., out, width] with Hessians [..., width, width]."""
    wide = hessian.shape[-1] > WIDE
    metric = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) if wide else hessian.contiguous()

    def weighed(steps: Tensor) -> Tensor:
        return steps * metric if wide else steps @ metric

    def error(apart: Tensor) -> Tensor:
        return weighed(apart).mul_(apart).sum(-1, keepdim=True)

    grid = fit_at_once(weight, spec, error)
    if not spec.clip or spec.form.is_float:
        return grid
    trial = _least_squares(weight, weighed, grid, spec), grid[1]
    better = off(weight, trial, spec, error) < off(weight, grid, spec, error)
    return where(better, trial[0], grid[0]), grid[1]


def _least_squares(weight: Tensor, weighed: Error, grid: Grid, spec: Spec) -> Tensor:
    """The scale that suits the codes of this grid best, of the sign it had; the old one where there is none."""
    steps = encode(weight, *grid, spec) if grid[1] is None else encode(weight, *grid, spec) - grid[1]
    across = weighed(steps)
    energy = (across * steps).sum(-1, keepdim=True)
    return usable((across * weight).sum(-1, keepdim=True) / energy, grid[0], spec)


def usable(scale: Tensor, old: Tensor, spec: Spec) -> Tensor:
    """Scales in the stored type; the old ones where the new ones are too small, not finite or of another sign."""
    scale = scale.to(spec.stored)
    return where(scale.isfinite() & (scale.abs() >= spec.floor) & (scale.sign() == old.sign()), scale, old)
