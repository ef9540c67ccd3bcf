"""Second moments of what a projection reads, and what a change of its weights does to what it writes.

    H = sum_t x_t x_t^T  [in, in]            diag(D H D^T)  [out]: the energy that each row of a change D puts out

H is symmetric: of both, the block columns from the diagonal down are computed, which is half of the work.
"""
import torch
from torch import Tensor

from llmopt.scale.processes import Ranks

WIDTH = 256         # columns of a block


def blocks_of(size: int) -> list[slice]:
    """The block columns of a matrix."""
    return [slice(start, min(start + WIDTH, size)) for start in range(0, size, WIDTH)]


def mirrored_(lower: Tensor) -> Tensor:
    """A symmetric matrix that was known from the diagonal down, filled in place."""
    for block in blocks_of(len(lower)):
        lower[block, block.stop:] = lower[block.stop:, block].T
    return lower


class Gram:
    """Sum of x x^T over the tokens of all processes.

    Added up in float64, so that the order, which depends on the number of processes, is lost in the rounding.
    """

    def __init__(self, ranks: Ranks = Ranks()):         # noqa: B008  frozen
        self.lower: Tensor | None = None                # [in, in], up to date from the diagonal down
        self.tokens, self.ranks = 0, ranks

    def add(self, x: Tensor) -> None:
        """Take in `x` [N, in]."""
        x = x.float()
        self._begin(x)
        self.tokens += len(x)
        for block in blocks_of(x.shape[1]):
            self.lower[block.start:, block].add_(x[:, block.start:].T @ x[:, block])

    def join(self, like: Tensor) -> None:
        """Take in what the other ranks have seen; nothing is added after that. like: something [..., in]."""
        self.tokens = sum(self.ranks.gather(self.tokens))
        if self.tokens:
            self._begin(like)                           # this rank may have had no row
            for block in blocks_of(like.shape[1]):
                self.ranks.sum_(self.lower[block.start:, block])

    def whole(self) -> Tensor:
        """H [in, in], float64."""
        return mirrored_(self.lower)

    def _begin(self, like: Tensor) -> None:
        if self.lower is None:
            self.lower = torch.zeros(like.shape[1], like.shape[1], dtype=torch.float64, device=like.device)


def row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """diag(D H D^T) [out] of D = `change` [out, in]: what each row loses over the tokens behind `hessian`."""
    found = change.new_zeros(len(change))
    for block in blocks_of(len(hessian)):
        mixed = change[:, block] @ hessian[block, block]
        mixed.addmm_(change[:, block.stop:], hessian[block.stop:, block], alpha=2)
        found += (mixed * change[:, block]).sum(1)
    return found


def energy(change: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T): what all rows lose."""
    return float(row_errors(change, hessian).sum())
