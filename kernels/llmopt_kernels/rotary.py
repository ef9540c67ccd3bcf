"""Rotary position embedding and its inverse.

Half layout: channel c turns with channel c + R / 2; the channels behind the first R do not turn.
"""
import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] turned by tables [..., R], in fp32 and back."""
    turned, rest = _split(x, cos)
    return torch.cat([turned * cos.float() + _half(turned) * sin.float(), rest], -1).to(x.dtype)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rotate`; tables that also scale (YaRN, longrope) are divided out."""
    turned, rest = _split(x, cos)
    cos, sin = cos.float(), sin.float()
    back = (turned * cos - _half(turned) * sin) / (cos * cos + sin * sin)
    return torch.cat([back, rest], -1).to(x.dtype)


def _split(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :cos.shape[-1]].float(), x[..., cos.shape[-1]:].float()


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
