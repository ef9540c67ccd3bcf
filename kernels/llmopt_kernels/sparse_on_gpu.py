"""Sparse attention on a GPU, in Triton: what `sparse.sparse_partial` means, in one pass over the keys that are read.

A program has BM rows of one tile and head. Its softmax goes over the first keys, over listed columns, which it gathers
one by one, over listed blocks, which lie together, and over the local keys; it starts from the sum of what the selector
has computed already, which is how the two are merged. Written for GPUs of the H200's class, without block pointers.
Tested under Triton's interpreter; never run on a GPU.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmopt_kernels.partial import Partial
from llmopt_kernels.reference import NONE, Rule

LOG2E = tl.constexpr(math.log2(math.e))


def fits(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule) -> bool:
    """True where `triton_partial` knows all that is asked for. Not: softcap, pooled keys, gradients, uneven D."""
    dim = query.shape[-1]
    return (query.dtype == keys.dtype == values.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and keys.shape[-1] == values.shape[-1] and 16 <= dim <= 256 and dim & (dim - 1) == 0
            and not (torch.is_grad_enabled() and query.requires_grad) and rule.softcap is None
            and stripes.pooled is None)


@triton.jit
def _softmax(acc, highest, total, pairs, query, keys, values, j, seen, scaling, stride, dim, EXACT: tl.constexpr):
    """(acc, highest, total, pairs) after keys j [BN] of which the rows see `seen` [BM, BN]; logits in base 2."""
    here = j >= 0
    key = tl.load(keys + j[:, None] * stride + dim[None, :], mask=here[:, None], other=0)
    value = tl.load(values + j[:, None] * stride + dim[None, :], mask=here[:, None], other=0)
    if EXACT:                                           # and under the interpreter, whose bfloat16 products are garbage
        logits = tl.dot(query, tl.trans(key.to(tl.float32)), input_precision="ieee") * scaling
    else:
        logits = tl.dot(query, tl.trans(key)) * scaling
    logits = tl.where(seen, logits, float("-inf"))
    top = tl.maximum(highest, tl.max(logits, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights, before = tl.exp2(logits - safe[:, None]), tl.exp2(highest - safe)
    if EXACT:
        more = tl.dot(weights, value.to(tl.float32), input_precision="ieee")
    else:
        more = tl.dot(weights.to(value.dtype), value)
    return (acc * before[:, None] + more, top, total * before + tl.sum(weights, 1),
            pairs + tl.sum(seen.to(tl.int32), 1))


@triton.jit
def _stripes(query, keys, values, out, lse, pairs, local, columns, column_counts, blocks, block_counts,
             heads, groups, tokens, offset, stride_h, stride_g, stride, sinks, reach, tiles, of_local, of_columns,
             of_blocks, per_columns, per_blocks, scaling, TILE: tl.constexpr, BLOCK: tl.constexpr,
             WINDOWS: tl.constexpr, DONE: tl.constexpr, EXACT: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    number, head = tl.program_id(0), tl.program_id(2)
    begin = number * TILE + tl.program_id(1) * BM
    end = tl.minimum(tl.minimum((number + 1) * TILE, tokens), begin + BM)
    m, d, step = begin + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    real, i = m < end, offset + m
    unit = head * of_local // heads
    if WINDOWS:                                                     # the first local key of each row, and of the first
        first = i - tl.load(local + unit) + 1
        lowest = offset + begin - tl.load(local + unit) + 1
    else:
        lowest = tl.load(local + unit * tiles + number)
        first = tl.zeros((BM,), tl.int32) + lowest
    oldest = tl.maximum(offset + begin - reach + 1, 0)              # that a sliding window leaves
    at = m[:, None] * D + d[None, :]
    rows = tl.load(query + head * stride_h + m[:, None] * stride + d[None, :], mask=real[:, None], other=0)
    if EXACT:
        rows = rows.to(tl.float32)
    of_head = head * groups // heads * stride_g
    keys, values, out, lse = keys + of_head, values + of_head, out + head * tokens * D, lse + head * tokens
    if DONE:
        highest = tl.load(lse + m, mask=real, other=float("-inf")) * LOG2E
        acc = tl.load(out + at, mask=real[:, None], other=0).to(tl.float32)
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
    else:
        highest = tl.full((BM,), float("-inf"), tl.float32)
        acc, total = tl.zeros((BM, D), tl.float32), tl.zeros((BM,), tl.float32)
    counted = tl.zeros((BM,), tl.int32)
    if not DONE:
        for place in range(0, sinks, BN):
            j = place + step
            seen = (j[None, :] < sinks) & (j[None, :] < first[:, None]) & (j[None, :] <= i[:, None])
            seen = seen & (i[:, None] - j[None, :] < reach) & real[:, None]
            inside = tl.where(j < offset + tokens, j, -1)
            acc, highest, total, counted = _softmax(acc, highest, total, counted, rows, keys, values, inside, seen,
                                                    scaling, stride, d, EXACT)
    lane = head * of_columns // heads * tiles + number
    count = tl.load(column_counts + lane)
    for place in range(0, count, BN):
        j = tl.load(columns + lane * per_columns + place + step, mask=place + step < count, other=-1)
        seen = (j[None, :] >= sinks) & (j[None, :] < first[:, None]) & (j[None, :] <= i[:, None])
        seen = seen & (i[:, None] - j[None, :] < reach) & real[:, None]
        acc, highest, total, counted = _softmax(acc, highest, total, counted, rows, keys, values,
                                                 j, seen, scaling, stride, d, EXACT)
    lane = head * of_blocks // heads * tiles + number
    for place in range(tl.load(block_counts + lane)):
        block = tl.load(blocks + lane * per_blocks + place)
        for inside in range(0, BLOCK, BN):
            j = block * BLOCK + inside + step
            here = (inside + step < BLOCK) & (j < offset + tokens)
            seen = here[None, :] & (j[None, :] >= sinks) & (j[None, :] < first[:, None]) & (j[None, :] <= i[:, None])
            seen = seen & (i[:, None] - j[None, :] < reach) & real[:, None]
            acc, highest, total, counted = _softmax(acc, highest, total, counted, rows, keys, values,
                                                     tl.where(here, j, -1), seen, scaling, stride, d, EXACT)
    if not DONE:
        for place in range(tl.maximum(lowest, oldest), offset + end, BN):
            j = place + step
            seen = (j[None, :] >= first[:, None]) & (j[None, :] <= i[:, None]) & real[:, None]
            seen = seen & (i[:, None] - j[None, :] < reach)
            inside = tl.where(j < offset + tokens, j, -1)
            acc, highest, total, counted = _softmax(acc, highest, total, counted, rows, keys, values, inside, seen,
                                                    scaling, stride, d, EXACT)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + m, tl.where(total > 0, (highest + tl.log2(total)) / LOG2E, float("-inf")), mask=real)
    tl.store(pairs + head * tokens + m, counted, mask=real)


def triton_partial(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule,
                   exact: bool | None = None) -> tuple[Partial, Tensor]:
    """See `sparse.sparse_partial`; out is of the queries' type. exact: products in float32; None: where queries are."""
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    (heads, tokens, dim), total, device = query.shape, keys.shape[1], query.device
    tiles = -(-tokens // stripes.tile)
    windows = stripes.start is None
    local = torch.as_tensor(stripes.window if windows else stripes.start, device=device).int()
    local = local.reshape(-1) if windows else local.reshape(-1, tiles)
    columns, column_counts, blocks, block_counts = _lists(stripes, tiles, tokens, total, device)
    whole = (Partial(torch.empty_like(query), torch.empty(heads, tokens, device=device)) if stripes.done is None else
             Partial(stripes.done.out.to(query.dtype, copy=True).contiguous(), stripes.done.lse.clone().contiguous()))
    pairs = torch.empty(heads, tokens, dtype=torch.int32, device=device)
    bm = min(128, max(16, triton.next_power_of_2(min(stripes.tile, tokens))))
    _stripes[tiles, triton.cdiv(stripes.tile, bm), heads](
        query, keys, values, whole.out, whole.lse, pairs, local.contiguous(), columns, column_counts, blocks,
        block_counts, heads, len(keys), tokens, total - tokens, query.stride(0), keys.stride(0), dim,
        stripes.sinks, rule.window or total, tiles, len(local), len(columns), len(blocks), columns.shape[-1],
        blocks.shape[-1], rule.scaling * LOG2E.value, TILE=stripes.tile, BLOCK=stripes.block, WINDOWS=windows,
        DONE=stripes.done is not None, EXACT=query.dtype == torch.float32 if exact is None else exact, BM=bm,
        BN=64 if dim <= 128 else 32, D=dim, num_warps=8 if bm == 128 else 4, num_stages=3 if dim <= 64 else 2)
    pairs = pairs.sum(1, dtype=torch.int64)
    return whole, pairs if stripes.done is None else pairs + _base_pairs(local, stripes, rule, heads, tokens, total)


def _lists(stripes, tiles: int, tokens: int, total: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns [X, tiles, C] and their counts [X, tiles], blocks and theirs, int32: each key in one of them, once."""
    none = torch.full((1, tiles, 1), NONE, device=device)
    columns, blocks = (none if x is None else x for x in (stripes.columns, stripes.blocks))
    if stripes.diagonals is not None:                   # every key that a distance reaches from some row of the tile
        rows = torch.arange(total - tokens, total, device=device)
        found = [stripes.listed(number, total, part) for number, part in enumerate(rows.split(stripes.tile))]
        widest = max(x.shape[1] for x in found)
        columns = torch.stack([torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=NONE) for x in found], 1)
        blocks = none
    columns, blocks = _once(columns, total), _once(blocks, -(-total // stripes.block))
    most = max(len(columns), len(blocks))
    if len(columns) > 1 or len(blocks) > 1:
        columns, blocks = (x.repeat_interleave(most // len(x), 0) for x in (columns, blocks))
    listed = torch.zeros(*blocks.shape[:2], -(-total // stripes.block) + 1, dtype=torch.bool, device=device)
    listed.scatter_(2, blocks.where(blocks != NONE, listed.shape[2] - 1), True)
    twice = listed[..., :-1].gather(2, (columns // stripes.block).clamp(min=0)) & (columns != NONE)
    columns = _once(columns.masked_fill(twice, NONE), total)
    return (columns.int().contiguous(), (columns != NONE).sum(-1).int().contiguous(), blocks.int().contiguous(),
            (blocks != NONE).sum(-1).int().contiguous())


def _once(x: Tensor, beyond: int) -> Tensor:
    """[..., C] in order, each number below `beyond` once, NONE behind them."""
    x = x.masked_fill((x == NONE) | (x >= beyond), beyond).sort(-1).values
    again = torch.nn.functional.pad(x[..., 1:] == x[..., :-1], (1, 0))
    x = x.masked_fill(again, beyond).sort(-1).values
    return x.masked_fill(x == beyond, NONE)


def _base_pairs(local: Tensor, stripes, rule: Rule, heads: int, tokens: int, total: int) -> Tensor:
    """Pairs of the base, [H]."""
    i = torch.arange(total - tokens, total, device=local.device)
    oldest = (i - (rule.window or total) + 1).clamp(min=0)
    first = (i - local[:, None] + 1 if stripes.start is None else
             local.long().repeat_interleave(stripes.tile, 1)[:, :tokens])
    first = first.maximum(oldest).minimum(i + 1)
    base = (i - first + 1 + (first.clamp(max=stripes.sinks) - oldest).clamp(min=0)).sum(1)
    return base.repeat_interleave(heads // len(base))
