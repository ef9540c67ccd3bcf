"""What sparse attention means, in plain torch: which keys a tile of query rows reads, and attention over those alone.

Notation as in `reference.py`; X lists of keys, one per KV head (X = G) or per query head (X = H).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.reference import NONE, Rule, product, softmax


@dataclass(frozen=True)
class Pooled:
    """Stand-ins for runs of far keys: a mean key and value with the logarithm of how many they stand for.

    keys [X, P, D], values [X, P, D], log_counts [X, P] fp32; ends: int64 [P], last key that each one stands for. Row i
    reads those that end before its local window; that none of their keys is listed besides is the selector's business.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Stripes:
    """Which keys each row tile reads: `sinks` first keys, `window` last keys, chosen columns, chosen blocks of keys.

    columns: int64 [X, tiles, C], in any order, NONE as filler; None: no columns.
    blocks: int64 [X, tiles, K], n standing for the keys from n * block to (n + 1) * block - 1; NONE as filler.
    tile: number of query rows that share one list. A key named twice counts once, a key after its row not at all.
    """

    sinks: int
    window: int
    columns: Tensor | None = None
    tile: int = 128
    blocks: Tensor | None = None
    block: int = 64
    pooled: Pooled | None = None

    def listed(self, number: int, total: int) -> Tensor | None:
        """The keys below `total` that the lists name for one tile, each once: int64 [X, C], NONE as filler."""
        lists = [] if self.columns is None else [self.columns[:, number]]
        if self.blocks is not None:
            picked = self.blocks[:, number].unsqueeze(-1)                            # [X, K, 1]
            inside = torch.arange(self.block, device=picked.device)
            lists.append((picked * self.block + inside).masked_fill(picked == NONE, NONE).flatten(1))
        if not lists:
            return None
        joined = torch.cat(_as_many(lists), 1)
        keys = joined.masked_fill(joined >= total, NONE).sort(-1).values
        again = torch.nn.functional.pad(keys[:, 1:] == keys[:, :-1], (1, 0))
        return keys.masked_fill(again, NONE)


def sparse_attention(query: Tensor, keys: Tensor, values: Tensor, stripes: Stripes,
                     rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention over the listed keys only, gathered tile by tile: [H, T, D] and computed pairs [H].

    query [H, T, D], keys and values [G, S, D]; the queries are the last T of the S tokens.
    """
    heads, tokens, dim = query.shape
    offset = keys.shape[1] - tokens
    out = query.new_empty(heads, tokens, values.shape[-1])
    pairs = torch.zeros(heads, dtype=torch.int64, device=query.device)
    for start in range(0, tokens, stripes.tile):
        part = slice(start, min(start + stripes.tile, tokens))
        rows = range(part.start + offset, part.stop + offset)
        read = _tile_keys(keys, values, stripes, start // stripes.tile, (rows, rule))
        out[:, part], count = _attend(query[:, part], read, rule)
        pairs += count
    return out, pairs


Read = tuple[Tensor, Tensor, Tensor, Tensor | None]    # keys, values [X, C, D], visible [X, R, C], bias [X, C] or None


def _tile_keys(keys: Tensor, values: Tensor, stripes: Stripes, number: int, place: tuple[range, Rule]) -> Read:
    """All that tile `number` reads; place = (positions of its rows, rule)."""
    rows, rule = place
    i = torch.arange(rows.start, rows.stop, device=keys.device)
    base = _base_columns(stripes, rows, rule, keys.device)
    near = (rule.visible(i, base) & _in_base(stripes, i, base)).unsqueeze(0)         # [1, R, C]
    read = [(keys[:, base], values[:, base], near, None)]
    extra = stripes.listed(number, keys.shape[1])
    if extra is not None:
        owner = torch.arange(len(extra), device=keys.device).unsqueeze(1) * len(keys) // len(extra)
        far = rule.visible(i, extra) & ~_in_base(stripes, i, extra)
        read.append((keys[owner, extra.clamp(min=0)], values[owner, extra.clamp(min=0)], far, None))
    if stripes.pooled is not None:
        read.append(_pooled_keys(stripes, i))
    return read[0] if len(read) == 1 else _joined(read)


def _pooled_keys(stripes: Stripes, i: Tensor) -> Read:
    pooled = stripes.pooled
    seen = pooled.ends <= i.unsqueeze(-1) - stripes.window                           # [R, P]
    return pooled.keys, pooled.values, seen.unsqueeze(0), pooled.log_counts


def _joined(read: list[Read]) -> Read:
    """Several pieces as one, for as many heads as the most finely chosen of them."""
    keys, values = (torch.cat(_as_many([piece[k] for piece in read]), 1) for k in (0, 1))
    most = len(keys)
    visible = torch.cat([_repeated(piece[2], most) for piece in read], -1)
    if all(piece[3] is None for piece in read):
        return keys, values, visible, None
    biases = [k.new_zeros(1, k.shape[1], dtype=torch.float32) if bias is None else bias for k, _, _, bias in read]
    return keys, values, visible, torch.cat([_repeated(bias, most) for bias in biases], 1)


def _as_many(lists: list[Tensor]) -> list[Tensor]:
    """Tensors [X, ...] repeated along the first axis to the largest X."""
    return [_repeated(x, max(map(len, lists))) for x in lists]


def _repeated(x: Tensor, count: int) -> Tensor:
    """[X, ...] -> [count, ...], each entry standing for the heads of its group."""
    return x if len(x) == count else x.repeat_interleave(count // len(x), 0)


def _attend(query: Tensor, read: Read, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention of one tile [H, R, D] over what it reads, and the pairs [H] that this took."""
    keys, values, seen, bias = read
    heads, tokens, dim = query.shape
    rows = query.view(len(keys), -1, tokens, dim)                                    # [X, h, R, D]
    logits = rule.logits(rows, keys.unsqueeze(1))
    if bias is not None:
        logits = logits + bias[:, None, None]
    weights = softmax(logits, seen.unsqueeze(1))
    out = product(weights, values.float().unsqueeze(1)).to(query.dtype)
    count = seen.sum((-1, -2)).expand(len(keys)).repeat_interleave(heads // len(keys))
    return out.reshape(heads, tokens, -1), count


def _base_columns(stripes: Stripes, rows: range, rule: Rule, device: torch.device) -> Tensor:
    """Sorted key indices that the dense base of this tile can touch."""
    reach = 0 if rule.window is None else max(0, rows.start - rule.window + 1)
    local = max(reach, rows.start - stripes.window + 1, 0)
    sinks = torch.arange(min(reach, stripes.sinks), min(stripes.sinks, local), device=device)
    return torch.cat([sinks, torch.arange(local, rows.stop, device=device)])


def _in_base(stripes: Stripes, i: Tensor, j: Tensor) -> Tensor:
    """Is key j [..., C] part of the dense base of row i [R]? bool [..., R, C]."""
    return (j < stripes.sinks).unsqueeze(-2) | (i.unsqueeze(-1) - j.unsqueeze(-2) < stripes.window)
