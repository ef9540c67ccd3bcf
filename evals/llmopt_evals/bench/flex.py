"""torch's flex_attention on the block lists of a selector, for comparison: the same pairs, by torch's own compiler."""
from collections.abc import Callable

import torch
from llmopt_kernels import Stripes
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmopt.errors import LlmoptError


def on(stripes: Stripes, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """The work of flex_attention for q [H, T, D], k and v [G, T, D]; None where stripes are not whole blocks."""
    mask = blocks_of(stripes, *q.shape[:2])
    if mask is None:
        return None
    work = torch.compile(flex_attention)

    def attend() -> Tensor:
        return work(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)

    try:
        attend()
    except (RuntimeError, OSError) as fact:
        raise LlmoptError(f"flex_attention: {str(fact).splitlines()[0]}; is there a C++ compiler (g++)?") from None
    return attend


def blocks_of(stripes: Stripes, heads: int, tokens: int) -> BlockMask | None:
    """What the stripes of a prompt read, as torch's form of block lists; None where it is not whole blocks."""
    size, tiles = stripes.block, -(-tokens // stripes.block)
    start = stripes.start
    if (stripes.blocks is None or stripes.tile != size or stripes.sinks % size or start is None or start.ndim > 1
            or tokens % size or bool((start % size).any())
            or any(x is not None for x in (stripes.columns, stripes.diagonals, stripes.verticals))):
        return None
    read = torch.zeros(len(stripes.blocks), tiles, tiles + 1, dtype=torch.bool)
    read.scatter_(2, stripes.blocks.where(stripes.blocks >= 0, tiles), True)
    n, own = torch.arange(tiles), torch.arange(tiles)[:, None]
    read = (read[..., :-1] | (n < stripes.sinks // size) | (n >= start[:, None] // size)) & (n <= own)
    read = read.repeat_interleave(heads // len(read), 0)[None]
    whole, cut = read & (n < own), read & (n == own)            # of the tile's own block rows see a part

    def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        return mask.sum(-1).int(), mask.int().argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(*lists(cut), *lists(whole), BLOCK_SIZE=size, mask_mod=_causal,
                                    seq_lengths=(tokens, tokens))


def _causal(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j
