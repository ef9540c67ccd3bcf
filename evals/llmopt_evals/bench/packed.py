"""`llmopt bench packed`: products with packed weights against dense ones, and what models take of the memory.

One thread, and its CPU time, so that neighbours on the machine count little; the weights of each kind take turns until
they are more than its caches hold, as the layers of a model do, and the fastest product counts. Models are loaded in
processes of their own: packed, dense, and as plain transformers has them after the first forward.
"""
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from llmopt_kernels import Codes, Words, chosen, laid_out, quant_matmul
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.model.codes import pack
from llmopt.progress import Progress
from llmopt_evals.bench.kv import bandwidth

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHES = 96 << 20           # bytes that no cache holds


@dataclass(frozen=True)
class Plan:
    """The products to measure: a square weight of this size, in these bits, with so many rows of x."""

    size: int = 4096
    bits: tuple[int, ...] = (8, 4, 3, 2)
    rows: tuple[int, ...] = (1, 16, 128)
    group: int = 128
    rounds: int = 12

    def __post_init__(self) -> None:
        if wrong := [bits for bits in self.bits if not 2 <= bits <= 8]:
            raise LlmoptError(f"{wrong[0]} bits given, 2 to 8 expected")
        if self.group != -1 and self.size % self.group:
            raise LlmoptError(f"groups of {self.group} do not divide a width of {self.size}")


QUICK = Plan(size=1024, bits=(4, 3), rows=(1, 16), rounds=3)
Product = Callable[[Tensor], Tensor]


def measure(plan: Plan, progress: Progress) -> list[dict]:
    """A row for each number of rows and kind of weight, ready for JSON; ratios above 1 are faster than dense."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return list(_rows(plan, progress))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _rows(plan: Plan, progress: Progress) -> Iterator[dict]:
    speed, dense = bandwidth(time.thread_time), {}
    for bits, name in progress([(0, name) for name in TYPES] + [(b, n) for b in plan.bits for n in TYPES], "weights"):
        weights = _weights(plan, bits, TYPES[name])
        for rows in plan.rows:
            x = torch.randn(rows, plan.size, generator=torch.Generator().manual_seed(0)).to(TYPES[name])
            seconds = _fastest(x, weights, plan.rounds)
            if not bits:
                dense[name, rows] = seconds
            yield {"rows": rows, "bits": bits or 8 * x.itemsize, "type": name, "way": _way(x, weights[0]),
                   "seconds": seconds, "bytes": _nbytes(weights[0]), "bandwidth": speed,
                   "of_bandwidth": _nbytes(weights[0]) / seconds / speed,
                   **{f"against_{other}": dense[other, rows] / seconds for other in TYPES if (other, rows) in dense}}


def _weights(plan: Plan, bits: int, dtype: torch.dtype) -> list[Tensor | Codes]:
    """Twins of a random weight, as many as no cache holds; bits: 0 for a dense one."""
    generator, size = torch.Generator().manual_seed(1), plan.size
    if bits:
        codes = torch.randint(-1 << bits - 1, 1 << bits - 1, (size, size), generator=generator, dtype=torch.int8)
        groups = 1 if plan.group == -1 else size // plan.group
        scales = torch.randn(size, groups, generator=generator).mul_(0.01).to(dtype)
        first = laid_out(Words(pack(codes, bits), bits, size, scales), dtype)
    else:
        first = torch.randn(size, size, generator=generator).to(dtype)
    return [first, *(copy.deepcopy(first) for _ in range(CACHES // _nbytes(first)))]


def _nbytes(weight: Tensor | Codes) -> int:
    return weight.nbytes


def _product(x: Tensor, weight: Tensor | Codes) -> Tensor:
    return F.linear(x, weight) if isinstance(weight, Tensor) else quant_matmul(x, weight)


def _way(x: Tensor, weight: Tensor | Codes) -> str:
    return "dense" if isinstance(weight, Tensor) else chosen(x, weight)


def _fastest(x: Tensor, weights: list[Tensor | Codes], rounds: int) -> float:
    """Seconds of this thread for one product, the fastest of them, after one that is not counted."""
    _product(x, weights[0])
    found, turn = [], cycle(weights)
    for _ in range(max(rounds, len(weights))):
        weight, start = next(turn), time.thread_time()
        _product(x, weight)
        found.append(time.thread_time() - start)
    return min(found)


# ------------------------------------------------------------------------------------------------------------- models

CHILD = """
import gc, json, os, sys, time
import psutil, torch
import transformers
if sys.argv[2] != "plain":
    import llmopt
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import compressed_tensors.quantization.lifecycle.forward
AutoModelForCausalLM
process = psutil.Process()
base = process.memory_info().rss
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    cache = model(torch.arange(3, 35)[None]).past_key_values
    found = []
    for _ in range(int(sys.argv[3])):
        start = time.thread_time()
        cache = model(torch.tensor([[5]]), past_key_values=cache).past_key_values
        found.append(time.thread_time() - start)
gc.collect()
held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())}
print(json.dumps({"resident": process.memory_info().rss - base, "tensors": sum(held.values()), "token": min(found)}))
"""


def models(folder: Path, dense: Path | None, tokens: int = 12) -> list[dict]:
    """A row for each way of loading: resident bytes above a process that has imported the same, bytes of the tensors,
    CPU seconds of the fastest token.
    """
    ways = [("packed", folder, "1"), ("plain", folder, "0"), *([("dense", dense, "0")] if dense else [])]
    return [{"model": name, "file": sum(file.stat().st_size for file in place.glob("*.safetensors")),
             **_child(place, name, packed, tokens)} for name, place, packed in ways]


def _child(folder: Path, name: str, packed: str, tokens: int) -> dict:
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), name, str(tokens)], capture_output=True, text=True,
                          env=os.environ | {"LLMOPT_PACKED": packed, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise LlmoptError(f"{folder}: {name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
