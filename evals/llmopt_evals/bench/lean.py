"""How much faster a pruned model reads and writes than its operations promise: shapes with random weights.

    share of the promise = (dense seconds / pruned seconds) / (dense operations / pruned operations)

Operations are those of transformers' own forward as torch counts them. The models take turns and the fastest time of
each counts, in CPU seconds of one thread, so that neighbours on the machine count little.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import llmopt
from llmopt.progress import Progress
from llmopt.prune import Magnitude
from llmopt_evals.synthetic import shape_of

VOCABULARY = 64                                     # the logits are no part of the question


@dataclass(frozen=True)
class Plan:
    """The measurements to make: a shape with so many blocks; tokens read at once, and behind which one is written."""

    shape: str = "llama-1b"
    blocks: int = 4
    ratios: tuple[float, ...] = (0.25, 0.5)
    tokens: int = 512
    rounds: int = 5


QUICK = Plan(shape="smollm2-135m", blocks=1, tokens=64, rounds=2)


def measure(plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    """A row for each ratio (0: dense) and work (prefill of `tokens`, decoding of one behind them), ready for JSON."""
    before = torch.get_num_threads()
    models = {ratio: _pruned(plan, ratio) for ratio in (0.0, *plan.ratios)}
    try:
        torch.set_num_threads(1)
        return _rows(models, plan, progress)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _rows(models: dict[float, nn.Module], plan: Plan, progress: Progress) -> list[dict[str, Any]]:
    works = {(ratio, name): work for ratio, model in models.items()
             for name, work in _works(model, plan.tokens).items()}
    fastest = {key: min(times) for key, times in zip(works, zip(*(
        [_seconds(work) for work in works.values()] for _ in progress(range(plan.rounds), "rounds")), strict=True),
        strict=True)}
    operations = {key: _operations(work) for key, work in works.items()}
    return [{"ratio": ratio, "work": name, "seconds": fastest[ratio, name], "operations": operations[ratio, name],
             "faster": (faster := fastest[0.0, name] / fastest[ratio, name]),
             "of_promise": faster / (operations[0.0, name] / operations[ratio, name])} for ratio, name in works]


def _pruned(plan: Plan, ratio: float) -> nn.Module:
    """The shape with that share of its FFN channels and of its KV groups gone."""
    config = shape_of(plan.shape, plan.blocks)
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    if ratio:
        llmopt.compress(model, [Magnitude(ratio=ratio, refit=False)])
    return model


def _works(model: nn.Module, tokens: int) -> dict[str, Callable[[], Any]]:
    """Reading `tokens` at once, and one more behind them, which leaves the cache as it was."""
    ids = torch.arange(tokens)[None] % VOCABULARY
    cache = model(ids, use_cache=True).past_key_values

    def write() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return {"prefill": lambda: model(ids, use_cache=False), "decoding": write}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
