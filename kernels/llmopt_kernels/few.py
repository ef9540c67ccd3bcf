"""Attention of a few queries to all keys of a lane: by torch's fused call, or by two products where keys are many.

    out = softmax(q K^T) V

The fused call packs blocks of keys anew for so few rows, and computes one head on one thread. Products read long keys
and values in the order in which they lie, and a lane that is alone in parts, one for each thread.
"""
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LONG = 1 << 20      # bytes of a lane's keys from which the products are faster on one thread, on AVX2 and AVX-512


def few_queries(rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """rows [B, G, g, D], keys and values [B, G, n, D] -> [B, G, g, D]; visible: bool, as a mask, or None."""
    if visible is not None or not _long(keys):
        return scaled_dot_product_attention(rows, keys, values, visible, scale=scaling)
    lanes = rows.flatten(0, 1) * scaling, keys.flatten(0, 1), values.flatten(0, 1)
    parts = torch.get_num_threads() if len(lanes[0]) == 1 else 1
    return (_lanes(*lanes) if parts == 1 else _lane(*(x[0] for x in lanes), parts)).view(rows.shape[:3] + (-1,))


def _long(keys: Tensor) -> bool:
    """True where the products are faster: on a CPU, in fp32, with keys that are many for each thread."""
    alone = keys.shape[0] * keys.shape[1] == 1
    many = keys.shape[2] * keys.shape[3] * 4 * (torch.get_num_threads() if alone else 1) >= LONG
    return many and keys.dtype == torch.float32 and keys.device.type == "cpu"


def _lanes(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[N, g, D], [N, n, D] twice -> [N, g, D]."""
    logits = torch.bmm(keys, rows.transpose(1, 2))                                   # [N, n, g]
    return torch.bmm(logits.transpose(1, 2).contiguous().softmax(-1), values)


def _lane(rows: Tensor, keys: Tensor, values: Tensor, parts: int) -> Tensor:
    """As `_lanes` for one of them, without the leading axis: products of so many parts of equal length, and a rest."""
    many = len(keys) // parts * parts
    first, second = (x[:many].view(parts, -1, x.shape[1]) for x in (keys, values))
    logits = torch.bmm(first, rows.T.expand(parts, -1, -1)).flatten(0, 1)            # [many, g]
    weights = torch.cat([logits, keys[many:] @ rows.T]).T.contiguous().softmax(-1)   # [g, n]
    of_parts = weights[:, :many].unflatten(1, (parts, -1)).transpose(0, 1)           # [parts, g, many / parts]
    return torch.bmm(of_parts, second).sum(0) + weights[:, many:] @ values[many:]
