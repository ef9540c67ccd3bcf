"""How much faster sparse attention will be than dense attention, about, before either is computed.

Counted in pairs of a query and a key that torch's dense causal kernel computes in the same time, and rounded to the
careful side, since dense attention is exact. The numbers are constants, not measured on the machine at hand, so that
a model answers alike everywhere; where they come from: `kernels/RESULTS.md`.
"""
import torch
from torch import Tensor

from llmopt_kernels.flash import fits
from llmopt_kernels.reference import Rule
from llmopt_kernels.sparse import Stripes

PAIR = {torch.float32: 1.6, torch.float16: 1.6, torch.bfloat16: 2.9}           # one pair, by torch's kernel in pieces
LISTED = {torch.float32: 2.2, torch.float16: 2.2, torch.bfloat16: 3.5}         # the same, where keys are listed
LINES = {torch.float32: 2.8, torch.float16: 2.8, torch.bfloat16: 5.5}         # by columns and distances of all tiles
ROW = {torch.float32: 300, torch.float16: 300, torch.bfloat16: 600}           # one head's columns for one row
TILE = {torch.float32: 60_000, torch.float16: 60_000, torch.bfloat16: 170_000}         # one head's lists for one tile
GATHERED = 9.0          # one pair by products of gathered keys
LOCAL = 5.0             # the same, where no keys are listed
LONG_WAY = 0.9          # either, where dense attention goes that way too
MASKED = 1.2            # dense attention under a mask, which skips nothing
ON_GPU = 1.5


def gain(query: Tensor, keys: Tensor, values: Tensor, stripes: Stripes, rule: Rule) -> float:
    """Seconds of dense / seconds of sparse attention; query [H, T, D], keys and values [G, S, D], the last T of S."""
    tokens, total = query.shape[1], keys.shape[1]
    causal = tokens * total - tokens * (tokens - 1) / 2
    cut = rule.window is not None and rule.window < total
    dense = MASKED * tokens * total if cut and rule.plain else causal
    pairs = stripes.about(tokens, total)
    if query.is_cuda:
        return dense / (ON_GPU * pairs)
    if fits(query.detach(), keys, values, stripes, rule):            # what is read must not hang on gradients
        if not stripes.has_lists and stripes.verticals is None:
            return dense / (PAIR[query.dtype] * pairs)
        if stripes.columns is None and stripes.blocks is None:
            return dense / (LINES[query.dtype] * pairs + ROW[query.dtype] * tokens * (stripes.verticals is not None))
        return dense / (LISTED[query.dtype] * pairs + TILE[query.dtype] * tokens / stripes.tile)
    each = GATHERED if stripes.has_lists or stripes.verticals is not None or stripes.pooled is not None else LOCAL
    return dense / ((each if rule.plain else LONG_WAY) * pairs)
