"""`llmopt bench kv`: how fast tokens come from a compressed cache, against transformers' DynamicCache with sdpa.

Real forwards of one token each, batch of one, float32, through blocks of true shapes with random weights, behind a
prompt of noise. A stopwatch takes attention apart: from the moment a layer's cache is given the token until attention
has answered. The caches take turns, and the fastest token of each counts, so that neighbours on the machine count
little; but for the first token behind the prompt, which makes room for others and is told apart.
"""
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmopt.errors import LlmoptError
from llmopt.kv.allocators import Heads
from llmopt.kv.quant import Quant
from llmopt.kv.random import Random
from llmopt.method import Record
from llmopt.model.blocks import blocks
from llmopt.progress import Progress
from llmopt.runtime.attach import RuntimeMethod, attach, attachment, detach
from llmopt_evals.synthetic import shape_of

SHAPES = {64: "llama-1b", 128: "qwen3-4b"}          # 32 query heads on 8 KV heads, both
VOCABULARY = 64                                     # the logits are no part of the question
STREAM = 1 << 26                                    # numbers that are summed to measure the memory's bandwidth
REMOVED = 0.75
STOCK = "stock"


@dataclass(frozen=True)
class Plan:
    """The measurements to make: tokens of the prompt, head dimensions, threads; the model's blocks, tokens a round."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    dims: tuple[int, ...] = tuple(SHAPES)
    threads: tuple[int, ...] = (1, 2)
    blocks: int = 2
    tokens: int = 16
    rounds: int = 5

    def __post_init__(self) -> None:
        for dim in self.dims:
            if dim not in SHAPES:
                raise LlmoptError(f"head dimension {dim} given, of {', '.join(map(str, SHAPES))} expected")


QUICK = Plan(lengths=(256, 1024), dims=(64,), threads=(1,), blocks=1, tokens=4, rounds=2)
Part = tuple[RuntimeMethod, Record]


def kinds(groups: int, layers: int) -> dict[str, list[Part]]:
    """What is attached for each cache; of uneven heads the largest keeps `groups` times as much as the smallest."""
    shares = [[float(1 + (head + layer) % groups) for head in range(groups)] for layer in range(layers)]
    uneven = Random(ratio=REMOVED, allocate=Heads(), heads="shares.json")
    return {STOCK: [],
            "all kept": [(Random(ratio=0.0), Record())],
            "25 %, even heads": [(Random(ratio=REMOVED), Record())],
            "25 %, uneven heads": [(uneven, Record({"shares": shares}))],
            "all in 4 bits": [(Quant(bits=4), Record())]}


def measure(plan: Plan, progress: Progress) -> list[dict]:
    """A row for each head dimension, number of threads, length and cache, ready for JSON."""
    settings = [(dim, threads, length) for dim in plan.dims for threads in plan.threads for length in plan.lengths]
    models = {dim: model_of(dim, plan.blocks) for dim in plan.dims}
    before, rows = torch.get_num_threads(), []
    try:
        for dim, threads, length in progress(settings, "settings"):
            torch.set_num_threads(threads)
            rows += [{"dim": dim, "threads": threads, "length": length, **row}
                     for row in compared(models[dim], length, plan)]
    finally:
        torch.set_num_threads(before)
    return rows


def model_of(dim: int, count: int) -> nn.Module:
    """So many blocks of the shape with this head dimension."""
    config = shape_of(SHAPES[dim], count)
    config.vocab_size = VOCABULARY
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def compared(model: nn.Module, length: int, plan: Plan) -> list[dict]:
    """A row for each kind of cache behind a prompt of `length` tokens."""
    prompt = noise(model, length)
    every = kinds(blocks(model)[0].kv_heads, len(prompt))
    caches = {name: _filled(model, parts, prompt) for name, parts in every.items()}
    fastest: dict[str, Round] = {}
    for _ in range(plan.rounds):
        for name, parts in every.items():
            with _attached(model, parts):
                found = timed(model, _apart(caches[name]), plan.tokens)
            fastest[name] = found.best_of(fastest.get(name, found))
    speed, stock = bandwidth(), fastest[STOCK]
    return [{"cache": name, **found._asdict(), "attention_ratio": stock.attention / found.attention,
             "step_ratio": stock.step / found.step, "bytes": _nbytes(caches[name]),
             "of_bandwidth": _nbytes(caches[name]) / len(prompt) / found.attention / speed, "bandwidth": speed}
            for name, found in fastest.items()]


def bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second at which memory is read by as many threads: a sum over 256 MiB, the fastest of five."""
    stream = torch.ones(STREAM)

    def seconds() -> float:
        start = clock()
        stream.sum()
        return clock() - start

    return stream.nbytes / min(seconds() for _ in range(5))


# ------------------------------------------------------------------------------------------------------------- caches


def noise(model: nn.Module, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By layer, the last query [1, H, 1, D], keys and values [1, G, length, D]."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(1, heads, tokens, block.head_dim, generator=generator)
                  for heads, tokens in ((block.heads, 1), (block.kv_heads, length), (block.kv_heads, length)))
            for block in blocks(model)]


@contextmanager
def _attached(model: nn.Module, parts: list[Part]) -> Iterator[None]:
    try:
        for method, record in parts:
            attach(model, method, record)
        yield
    finally:
        detach(model)


def _filled(model: nn.Module, parts: list[Part], prompt: list[tuple[Tensor, Tensor, Tensor]]) -> Cache:
    """The cache after the prompt; with methods, what they have left of it."""
    with _attached(model, parts):
        if parts:
            return attachment(model).rehearse(prompt[0][1].shape[2], prompt)
    cache = DynamicCache(config=model.config)
    for index, (_, keys, values) in enumerate(prompt):
        cache.update(keys, values, index)
    return cache


def _apart(cache: Cache) -> Cache:
    """A copy to continue from; transformers' layers make new tensors for every token."""
    if not isinstance(cache, DynamicCache):
        return cache.fork()
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _nbytes(cache: Cache) -> int:
    """Bytes held, which every step must read."""
    if not isinstance(cache, DynamicCache):
        return cache.nbytes()
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


# --------------------------------------------------------------------------------------------------------------- time


class Round(NamedTuple):
    """Seconds of the fastest token: attention of a layer, and the whole step. first: attention at the first token."""

    attention: float
    step: float
    first: float

    def best_of(self, other: "Round") -> "Round":
        """The lower figure of each."""
        return Round(*map(min, self, other))


class Watch:
    """Runs from a cache's update to the end of the attention that follows; `seconds` of them all."""

    def __init__(self) -> None:
        self.seconds = self.start = 0.0

    def starting(self, update: Callable) -> Callable:
        """`update` of a cache, which starts the watch."""
        def started(*args, **kwargs):
            self.start = time.perf_counter()
            return update(*args, **kwargs)

        return started

    def stopping(self, attention: Callable) -> Callable:
        """An attention function, at whose end the watch stops."""
        def stopped(*args, **kwargs):
            out = attention(*args, **kwargs)
            self.seconds += time.perf_counter() - self.start
            return out

        return stopped


@contextmanager
def _watched(model: nn.Module, cache: Cache) -> Iterator[Watch]:
    """Inside, a watch runs while this model attends to this cache."""
    watch, name = Watch(), model.config._attn_implementation
    cache.update = watch.starting(cache.update)
    ALL_ATTENTION_FUNCTIONS[name] = watch.stopping(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield watch
    finally:
        del ALL_ATTENTION_FUNCTIONS[name], cache.update


@torch.inference_mode()
def timed(model: nn.Module, cache: Cache, tokens: int) -> Round:
    """One round: so many tokens, and one before them."""
    steps, attention = [], []
    with _watched(model, cache) as watch:
        for token in torch.arange(tokens + 1)[:, None, None] % VOCABULARY:
            before, start = watch.seconds, time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            steps.append(time.perf_counter() - start)
            attention.append((watch.seconds - before) / len(cache.layers))
    return Round(min(attention[1:]), min(steps[1:]), attention[0])
