"""The product with a packed weight, by the fastest of its ways on this machine, and its gradient."""
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from llmopt_kernels.narrow import Int4, Int8
from llmopt_kernels.planes import Planes
from llmopt_kernels.words import PIECE, Codes, Way, Words, pieces

VARIABLE = "LLMOPT_QUANT_MATMUL"            # in the environment: the way for the whole process
MOST = 256                                  # rows that ways are measured with at most
TRIES = 3

_fixed: ContextVar[str | None] = ContextVar("fixed", default=None)
_fastest: dict[tuple, str] = {}             # of this machine, by all that the time depends on
_layouts: dict[tuple, type[Codes]] = {}


def quant_matmul(x: Tensor, weight: Codes, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the packed weight [N, K], and a bias [N]: [..., N] in the type of x, differentiable.

    Which way is fastest is measured at the first product of its kind; `fixed` and the variable LLMOPT_QUANT_MATMUL
    name one instead, where it is there.
    """
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        return _Product.apply(x, weight, bias)
    return _multiplied(x, weight, bias)


def laid_out(source: Words, dtype: torch.dtype) -> Codes:
    """The weight in the layout that one row is multiplied with fastest, for a model of this type.

    That is measured with the first weight of its kind; where a way is named, the first layout that has it is taken.
    """
    if source.words.device.type != "cpu":
        return source
    layouts = [Planes, *(kind for kind in (Int4, Int8) if kind.fits(source, dtype))]
    kind = (source.bits, source.shape, source.groups, dtype, torch.get_num_threads(), wanted())
    if len(layouts) == 1 or kind in _layouts:
        return _layouts.get(kind, Planes)(source)
    row = torch.ones(1, source.shape[1], dtype=dtype)
    made = [layout(source) for layout in layouts]
    best = min(made, key=lambda weight: _cost(row, weight.ways(row)))
    _layouts[kind] = type(best)
    return best


def _cost(x: Tensor, ways: dict[str, Way]) -> float:
    """Seconds of the fastest way; 0 where it has the one that is wanted."""
    return 0.0 if wanted() in ways else times(x, ways)[0][0]


@contextmanager
def fixed(way: str) -> Iterator[None]:
    """Inside, products take this way ("blocks" is exact and always there), for results that can be repeated."""
    token = _fixed.set(way)
    try:
        yield
    finally:
        _fixed.reset(token)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _multiplied(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        weight, rows = ctx.weight, grad.reshape(-1, grad.shape[-1])
        out = rows.new_zeros(len(rows), weight.shape[1], dtype=torch.float32)
        for piece in pieces(*weight.shape, PIECE):
            out += rows[:, piece] @ weight.dense(piece, grad.dtype)
        to_x = out.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
        return to_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None


@torch.no_grad()
def _multiplied(x: Tensor, weight: Codes, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    ways = weight.ways(rows)
    return ways[_chosen(rows, weight, ways)](rows, bias).view(*x.shape[:-1], weight.shape[0])


def chosen(x: Tensor, weight: Codes) -> str:
    """The name of the way that the product of x [M, K] with this weight takes."""
    return _chosen(x, weight, weight.ways(x))


def _chosen(x: Tensor, weight: Codes, ways: dict[str, Way]) -> str:
    if wanted() in ways:
        return wanted()
    if wanted() or len(ways) == 1 or not len(x):
        return next(iter(ways))
    count = min(MOST, 1 << (len(x) - 1).bit_length())
    kind = (type(weight), weight.bits, weight.shape, weight.groups, x.dtype, x.device, count,
            torch.get_num_threads())
    if kind not in _fastest:
        _fastest[kind] = times(x[:MOST], ways)[0][1]
    return _fastest[kind]


def wanted() -> str | None:
    """The way that is named for all products; None: the fastest."""
    return _fixed.get() or os.environ.get(VARIABLE) or None


def times(x: Tensor, ways: dict[str, Way]) -> list[tuple[float, str]]:
    """(seconds, name) of each way, the fastest first; each is tried once before it is measured."""
    found: dict[str, float] = {}
    for name, way in ways.items():
        took = _seconds(way, x)             # with whatever is made at the first call
        best = min(found.values(), default=float("inf"))
        found[name] = took if took > 8 * best else min(_seconds(way, x) for _ in range(TRIES))
    return sorted((seconds, name) for name, seconds in found.items())


def _seconds(way: Way, x: Tensor) -> float:
    start = time.perf_counter()
    way(x, None)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
