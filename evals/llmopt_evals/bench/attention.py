"""`llmopt bench attention`: how much faster sparse prefill is than torch's dense attention, selection included.

Noise of true shapes (8 query heads on 2 KV heads), in which one key of forty is one that all queries like, and the
first four more so. One thread, and its CPU time; selection and attention are timed apart, the fastest of some rounds.

    faster = dense seconds / (seconds of the selection + seconds of the attention)
    used   = dense seconds / seconds of what a model does, which computes densely where that is foretold to be faster
"""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmopt_kernels import Rule, sparse_attention
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from llmopt.attention.base import Selector, State
from llmopt.attention.sequences import Sequence as Prompt
from llmopt.errors import LlmoptError
from llmopt.method import Record
from llmopt.progress import Progress
from llmopt_evals.bench import flex

HEADS, GROUPS = 8, 2
METHODS = ("attention.a_shape: {ratio: 0.9}", "attention.a_shape: {ratio: 0.95}", "attention.anchor: {theta: 6}",
           "attention.anchor: {theta: 6, together: true}", "attention.block_topk: {keep: 5}",
           "attention.stem: {keep: 0.06}", "attention.vertical_slash: {vertical: 512, slash: 64}")


@dataclass(frozen=True)
class Plan:
    """The measurements to make: tokens of the prompt, head dimensions, the fastest of so many rounds."""

    lengths: tuple[int, ...] = (4096, 16384)
    dims: tuple[int, ...] = (64, 128)
    rounds: int = 3
    dtype: str = "float32"
    flex: bool = False                      # torch's flex_attention beside those that read whole blocks


QUICK = Plan(lengths=(512,), dims=(64,), rounds=2)


def measure(plan: Plan, methods: Sequence[Selector], progress: Progress) -> list[dict[str, Any]]:
    """A row for each length, dimension and method, ready for JSON; ratios above 1 are faster than dense.

    flex: how many times as long flex_attention takes for the same pairs, where that was asked for and can be said.
    """
    for method in methods:
        if method.needs_data or getattr(method, "heads", None):
            raise LlmoptError(f"{method.name}: decides beforehand by a model, and there is none here; --part recall")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        settings = [(length, dim) for length in plan.lengths for dim in plan.dims]
        return [row for length, dim in progress(settings, "settings") for row in _compared(length, dim, plan, methods)]
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _compared(length: int, dim: int, plan: Plan, methods: Sequence[Selector]) -> Iterator[dict[str, Any]]:
    q, k, v = drawn(length, dim, getattr(torch, plan.dtype))
    rule, causal = Rule(dim ** -0.5), length * (length + 1) / 2
    dense, _ = _fastest(lambda: scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True,
                                                             enable_gqa=True), plan.rounds)
    prompt = Prompt((0, 0), torch.arange(length), q, k, v, None, 0, rule)
    for method in methods:
        choosing, stripes = _fastest(lambda method=method: method.select(q, k, State(0, rule, v, 0, 0)), plan.rounds)
        using, _ = _fastest(lambda method=method: method.attend(prompt, 0, Record(), {}), plan.rounds)
        reading, (_, pairs) = _fastest(lambda stripes=stripes: sparse_attention(q, k, v, stripes, rule), plan.rounds)
        row = {"length": length, "dim": dim, "method": method.name, "fields": method.to_dict()[method.name],
               "density": float(pairs.double().mean()) / causal, "dense": dense, "selection": choosing,
               "attention": reading, "faster_attention": dense / reading, "faster": dense / (choosing + reading),
               "used": dense / using}
        other = flex.on(stripes, q, k, v) if plan.flex else None
        yield row if other is None else row | {"flex": _fastest(other, plan.rounds)[0] / reading}


def drawn(length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [H, length, D], keys and values [G, length, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, liked = (torch.randn(*shape, generator=generator) for shape in (
        (HEADS, length, dim), (GROUPS, length, dim), (GROUPS, length, dim), (GROUPS, 1, dim)))
    liked = normalize(liked, dim=-1)
    liked *= (dim / 64) ** 0.25                    # logits alike at every dimension
    q += 4 * liked.repeat_interleave(HEADS // GROUPS, 0)
    k[:, torch.randperm(length, generator=generator)[:length // 40]] += 8 * liked
    k[:, :4] += 12 * liked
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _fastest(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """(seconds of this thread for the fastest round, what the last one gave)."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        done = work()
        found.append(time.thread_time() - start)
    return min(found), done
