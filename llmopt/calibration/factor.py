"""The triangular factor that GPTQ sweeps with, made of block columns that several processes can share.

    H = R R^T, R upper triangular;      U = R^-1, so that U^T U = H^-1

Turned round in rows and columns this is the ordinary Cholesky factor L and its inverse M. Of L, the owner of a block
column finishes it and hands it round, and each rank takes it off the columns that it owns. The block columns of M do
not see each other. Every block is computed once, in the same way whoever does it: the result does not depend on the
number of processes.
"""
import torch
from torch import Tensor

from llmopt.calibration.second_moments import blocks_of
from llmopt.model.finite import all_finite
from llmopt.scale.processes import Ranks

MAX_DAMPING = 1.0


def times_inverse(rows: Tensor, factor: Tensor) -> Tensor:
    """`rows` [n, in] (H + damping)^-1 = rows U^T U; half of both products, U being triangular."""
    columns = blocks_of(len(factor))
    half = torch.cat([rows[:, block.start:] @ factor[block, block.start:].T for block in columns], 1)
    return torch.cat([half[:, :block.stop] @ factor[:block.stop, block] for block in columns], 1)


def inverse_factor(hessian: Tensor, damping: float, ranks: Ranks = Ranks()) -> tuple[Tensor | None, float]:  # noqa: B008
    """(U, damping used) with U^T U = (H + damping mean(diag H) I)^-1; more damping until it exists, or (None, last)."""
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.flip(0, 1)                 # a copy
        damped.diagonal().add_(damping * mean)
        if cholesky_(damped, ranks):
            inverse = inverse_lower(damped, ranks)
            if all_finite(inverse):
                return inverse.flip(0, 1), damping
        if damping >= MAX_DAMPING:
            return None, damping
        damping = min(MAX_DAMPING, max(10 * damping, 1e-3))


def cholesky_(matrix: Tensor, ranks: Ranks) -> bool:
    """Put L, L L^T = matrix, into the lower triangle; False, on all ranks, where it is not positive definite.

    Above the diagonal blocks the old values stay.
    """
    columns = blocks_of(len(matrix))
    for k, block in enumerate(columns):
        below = matrix[block.start:, block]                          # [rest, width]
        if k % ranks.size == ranks.rank:
            _finish(below)
        panel = ranks.broadcast_(below, k % ranks.size).contiguous()
        if not panel[-1].isfinite().all():
            return False
        for j, other in enumerate(columns):
            if j > k and j % ranks.size == ranks.rank:
                rest = panel[other.start - block.start:]
                matrix[other.start:, other].addmm_(rest, rest[:other.stop - other.start].T, alpha=-1)
    return True


def _finish(below: Tensor) -> None:
    """A block column from which those before it have been taken off: its part of L, or NaN."""
    width = below.shape[1]
    corner, failed = torch.linalg.cholesky_ex(below[:width])
    if failed:
        corner.fill_(torch.nan)
    below[:width] = corner
    below[width:] = torch.linalg.solve_triangular(corner.T, below[width:], upper=True, left=False)


def inverse_lower(lower: Tensor, ranks: Ranks) -> Tensor:
    """M = L^-1 of a lower triangular matrix (what is above its diagonal blocks is not read)."""
    inverse, columns = torch.zeros_like(lower), blocks_of(len(lower))
    corners = [_invert(lower[block, block]) for block in columns]
    for j, block in enumerate(columns):
        if j % ranks.size == ranks.rank:
            inverse[block, block] = corners[j]
            for i in range(j + 1, len(columns)):
                row, done = columns[i], slice(block.start, columns[i].start)
                inverse[row, block] = -corners[i] @ (lower[row, done] @ inverse[done, block])
    for j, block in enumerate(columns):
        ranks.broadcast_(inverse[block.start:, block], j % ranks.size)
    return inverse


def _invert(corner: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=corner.device), upper=False)
