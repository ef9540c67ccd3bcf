"""Numbers that quantized caches share: a random rotation, and the best levels for normally distributed values."""
import functools

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

SEED = 0


@functools.cache
@torch.inference_mode(False)
def rotation(dim: int) -> Tensor:
    """An orthogonal matrix [D, D], a randomized Hadamard transform: x @ rotation spreads large coordinates over all.

    D = odd * 2^n is turned by the Kronecker product of a Hadamard matrix of size 2^n and a drawn orthogonal one.
    """
    generator, even = torch.Generator().manual_seed(SEED), dim & -dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < even:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    drawn = torch.randn(dim // even, dim // even, generator=generator, dtype=torch.float64)
    odd = torch.linalg.qr(drawn).Q.contiguous()
    signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2 - 1
    return (signs * torch.kron(odd, hadamard / even ** 0.5)).float()


@functools.cache
@torch.inference_mode(False)
def normal_levels(bits: int) -> Tensor:
    """[2^bits] ascending levels of least squared error for the standard normal distribution (Lloyd, Max).

    Each level is the mean of the distribution between the midpoints to its neighbours, found by iteration.
    """
    count = 2 ** bits
    levels = 3 ** 0.5 * ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(1000):
        edges = torch.cat([levels.new_tensor([-torch.inf]), midpoints(levels), levels.new_tensor([torch.inf])])
        density = torch.exp(-edges ** 2 / 2) / (2 * torch.pi) ** 0.5
        levels = -density.diff() / ndtr(edges).diff()
    return levels.float()


def midpoints(levels: Tensor) -> Tensor:
    """The edges between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2
