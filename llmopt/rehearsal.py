"""What the KV cache of a model whose weights are not there will hold, found by filling a real cache with noise."""
import torch
from torch import nn
from transformers import DynamicCache

from llmopt.blocks import Block, blocks
from llmopt.runtime import attachment


@torch.no_grad()
def cache_bytes(model: nn.Module, length: int) -> int:
    """Bytes after a prompt of `length` tokens; methods keep as much of noise as of text."""
    live = attachment(model)
    if live is not None:
        generator = torch.Generator().manual_seed(0)
        layers = ([torch.randn(shape, generator=generator).to(model.dtype) for shape in _shapes(block, length)]
                  for block in blocks(model))
        return live.rehearse(length, layers).nbytes()
    cache = DynamicCache(config=model.config)
    for index, block in enumerate(blocks(model)):
        _, keys, values = (torch.empty(shape, dtype=model.dtype, device="meta") for shape in _shapes(block, length))
        cache.update(keys, values, index)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


def _shapes(block: Block, length: int) -> list[tuple[int, ...]]:
    """Queries [1, H, T, D], keys and values [1, G, T, D]; a skipped attention leaves one empty number per token."""
    heads, groups, dim = (block.heads, block.kv_heads, block.head_dim) if block.attention is not None else (1, 1, 1)
    return [(1, count, length, dim) for count in (heads, groups, groups)]
