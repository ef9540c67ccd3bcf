"""Orthogonal matrices that spread each channel evenly over all others, multiplied with and never written out.

    x Q = (x * s) (S (x) C) / sqrt(n)        n = 2^k m;  s: n random signs;  S: Sylvester's Hadamard matrix of 2^k

C [m, m] is a Hadamard matrix of the odd part of n times a small power of two, by Paley's two constructions; where there
is none, random and orthogonal. All entries of Q are then near 1 / sqrt(n) in size. With `mean`, for the streams of
LayerNorms, x Q has the mean of x: a reflection behind it takes the image of (1, ..., 1) back to (1, ..., 1).
"""
import math

import torch
from torch import Tensor


class Rotation:
    """x -> x Q [size, size] for each part of `size` channels along the last dimension of x, in float64."""

    def __init__(self, size: int, seed: int, mean: bool = False):
        noise = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (size,), generator=noise).double().mul_(2).sub_(1)
        self.core = core(size, noise)
        self.mirror: Tensor | None = None                       # [size], a vector of length sqrt(2)
        if mean:
            normal = self(torch.ones(size)) - 1
            self.mirror = None if normal.norm() < 1e-6 else normal * (math.sqrt(2) / normal.norm())

    def __call__(self, x: Tensor) -> Tensor:                    # [..., N size] -> the same
        signs, core = self.signs.to(x.device), self.core.to(x.device)
        parts = (x.double().unflatten(-1, (-1, len(signs))) * signs).unflatten(-1, (-1, len(core)))
        turned = sylvester(parts @ core).flatten(-2)            # [..., N, 2^k, m] -> [..., N, size]
        if self.mirror is not None:
            mirror = self.mirror.to(x.device)
            turned = turned - (turned @ mirror)[..., None] * mirror
        return turned.flatten(-2)


def sylvester(x: Tensor) -> Tensor:                             # [..., 2^k, m] -> the same
    """S x over the last dimension but one, S of length 1 in each row: k rounds of sums and differences."""
    size, width = x.shape[-2], 1
    while width < size:
        first, second = x.unflatten(-2, (-1, 2, width)).unbind(-3)
        x = torch.stack((first + second, first - second), -3).flatten(-4, -2)
        width *= 2
    return x / math.sqrt(size)


def core(size: int, noise: torch.Generator) -> Tensor:          # [m, m]
    """An orthogonal matrix of the odd part of `size` and some of its factors 2: Paley's, else a random one."""
    odd = size // (size & -size)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    order = odd
    while size % order == 0:
        found = paley(order)
        if found is not None:
            return found / math.sqrt(order)
        order *= 2
    q, r = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=noise))
    return q * r.diagonal().sign()


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix [order, order] from the squares modulo a prime, order - 1 or order / 2 - 1, or None."""
    if order % 4 == 0 and is_prime(order - 1):
        return bordered(order - 1, -1) + torch.eye(order, dtype=torch.float64)
    if order % 8 == 4 and is_prime(order // 2 - 1):
        ones, other = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        conference = bordered(order // 2 - 1, 1)
        return torch.kron(conference, ones) + torch.kron(torch.eye(order // 2, dtype=torch.float64), other)
    return None


def bordered(prime: int, below: int) -> Tensor:                 # [prime + 1, prime + 1]
    """0, then 1 for a square and -1 for none at each difference i - j, with a first row of 1 and column of `below`."""
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[torch.arange(1, prime) ** 2 % prime], squares[0] = 1, 0
    places = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[1:, 1:], found[0, 1:], found[1:, 0] = squares[(places[:, None] - places) % prime], 1, below
    return found


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
