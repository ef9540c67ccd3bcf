"""What the KV cache of a model whose weights are not there will hold, found by filling a real cache with noise."""
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmopt.blocks import Block, blocks
from llmopt.runtime import attachment


@torch.no_grad()
def cache_bytes(model: nn.Module, length: int) -> int:
    """Bytes after a prompt of `length` tokens; methods keep as much of noise as of text."""
    generator = torch.Generator().manual_seed(0)
    drawn = [_noise(block, length, model.dtype, generator) for block in blocks(model)]
    live = attachment(model)
    if live is not None:
        return live.rehearse(drawn).nbytes()
    cache = DynamicCache(config=model.config)
    for index, (_, keys, values) in enumerate(drawn):
        cache.update(keys, values, index)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


def _noise(block: Block, length: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, H, T, D], keys and values [1, G, T, D]; a skipped attention leaves one empty number per token."""
    heads, groups, dim = (block.heads, block.kv_heads, block.head_dim) if block.attention is not None else (1, 1, 1)
    return tuple(torch.randn(1, count, length, dim, generator=generator).to(dtype) for count in (heads, groups, groups))
