"""`llmopt bench kv`, its second part: what share of a prompt's reading each scorer takes, and the whole compression.

Real prefills of a prompt of noise, batch of one, float32, through blocks of a true shape with random weights. A watch
runs while scores are worked out, another while the cache is compressed, the first included; the share is that of the
forward without the compression. So both come from one run, and neighbours on the machine slow both. For kv.kvzip, which
reads the prompt again, that is part of the scores.
"""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmopt.kv.base import Scorer
from llmopt.kv.kvzap import KVzap
from llmopt.method import Record
from llmopt.parts import get, names
from llmopt.progress import Progress
from llmopt.runtime.attach import attach, detach
from llmopt_evals.synthetic import shape_of

VOCABULARY = 64                                     # the logits are no part of the question


@dataclass(frozen=True)
class Plan:
    """The measurements to make: the shape and blocks, tokens of the prompt, how often; the least share counts."""

    shape: str = "smollm2-135m"
    lengths: tuple[int, ...] = (1024, 4096)
    threads: int = 1
    blocks: int = 2
    rounds: int = 3
    removed: float = 0.75


QUICK = Plan(lengths=(256,), blocks=1, rounds=1)


class Shares(NamedTuple):
    """Of the seconds that a prefill takes apart from the compression: those for scores, for the whole compression."""

    scores: float
    compression: float


def measure(plan: Plan, progress: Progress) -> list[dict]:
    """A row for each scorer and length, ready for JSON."""
    config = shape_of(plan.shape, plan.blocks)
    config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    settings = [(name, length) for length in plan.lengths for name in scorers()]
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        return [{"method": name, "length": length, **shares(model, name, length, plan)._asdict()}
                for name, length in progress(settings, "scorers")]
    finally:
        torch.set_num_threads(before)


def scorers() -> list[str]:
    """The names of all registered scorers."""
    return [name for name in names() if issubclass(get(name), Scorer)]


def shares(model: nn.Module, name: str, length: int, plan: Plan) -> Shares:
    """What one scorer takes of a prompt of so many tokens; the lowest of the rounds, each figure by itself."""
    method = get(name)(ratio=plan.removed)
    tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    attach(model, method, _record(method, model))
    try:
        found = [_round(model, tokens) for _ in range(plan.rounds)]
    finally:
        detach(model)
    return Shares(*map(min, zip(*found, strict=True)))


def _record(method: Scorer, model: nn.Module) -> Record:
    """What a scorer that learns would have learned: noise, which takes as long."""
    if not isinstance(method, KVzap):
        return Record()
    return Record(tensors={f"student.{index}": torch.randn(shape) / shape[1]
                           for index, shape in method.weight_shapes(model).items()})


@torch.inference_mode()
def _round(model: nn.Module, tokens: torch.Tensor) -> Shares:
    with watched(Scorer, "scores_of") as scores, watched(Scorer, "compress") as compression:
        start = time.perf_counter()
        model(tokens, use_cache=True)
        whole = time.perf_counter() - start
    return Shares(*(sum(watch) / (whole - sum(compression)) for watch in (scores, compression)))


@contextmanager
def watched(owner: Any, name: str) -> Iterator[list[float]]:
    """Inside, the seconds of every call of this function of `owner`."""
    real: Callable = getattr(owner, name)
    seconds = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, real)
