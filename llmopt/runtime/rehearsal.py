"""What the KV cache of a model will hold, with or without weights: found by filling a real cache with noise."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache

from llmopt.model.blocks import Block, blocks
from llmopt.model.context import context_length
from llmopt.runtime.attach import attachment


@torch.no_grad()
def cache_bytes(model: nn.Module, length: int) -> int:
    """Bytes after a prompt of `length` tokens; methods keep as much of noise as of text."""
    live = attachment(model)
    if live is not None:
        generator, views = torch.Generator().manual_seed(0), blocks(model)
        layers = ([torch.randn(shape, generator=generator).to(model.dtype) for shape in _shapes(block, length)]
                  for block in views)
        with _noisy([block.attn_out.module for block in views if block.attn_out is not None], generator):
            return live.rehearse(length, layers).nbytes()
    cache, views = DynamicCache(config=model.config), blocks(model)
    for index, block in enumerate(views):
        if block.read is not None and block.attention is None:      # whatever else it keeps, it does not grow
            continue
        _, keys, values = (torch.empty(shape, dtype=model.dtype, device="meta") for shape in _shapes(block, length))
        cache.update(keys, values, index)
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if t is not None]
    return sum(t.numel() * t.element_size() for t in held)


@contextmanager
def _noisy(modules: list[nn.Module], generator: torch.Generator) -> Iterator[None]:
    """Weights of noise for modules that have none, for the scorers that look at them: one for all of a shape."""
    before, noise = [module.weight for module in modules], {}
    try:
        for module, weight in zip(modules, before, strict=True):
            if weight.is_meta:
                drawn = noise.get(weight.shape)
                if drawn is None:
                    drawn = noise[weight.shape] = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                module.weight = nn.Parameter(drawn, requires_grad=False)
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight = weight


def _shapes(block: Block, length: int) -> list[tuple[int, ...]]:
    """Queries [1, H, T, D], keys and values [1, G, T, D]; a skipped attention leaves one empty number per token."""
    heads, groups, dim = (block.heads, block.kv_heads, block.head_dim) if block.attention is not None else (1, 1, 1)
    return [(1, count, length, dim) for count in (heads, groups, groups)]


def prompt_length(model: nn.Module) -> int:
    """Tokens of the prompt whose cache is measured."""
    return min(512, context_length(model.config) // 2)


def cache_bytes_per_token(model: nn.Module) -> float:
    """Bytes that the KV cache holds after a prompt, per token; shapes tell it, no forward is needed."""
    length = prompt_length(model)
    return cache_bytes(model, length) / length
