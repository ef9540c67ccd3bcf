"""What the ratio is a share of: the pieces that a recipe names in `budget`.

    parameters    all that leaves with a unit
    flops         2 for each weight, and for each query head 2 D T for its products with keys and values, a token of T
    latency       time of the part with so many units, on this machine: its matrix products and its attention

A budget gives each layer part a price for every number of units that it may keep; scopes look at nothing else. A table
of times is measured once for each shape of a part, goes into the record, and can be given as a file, so that a plan
can be made again, or for another machine.
"""
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from llmopt.calibration.walk import each
from llmopt.errors import LlmoptError, closest
from llmopt.files.checks import load_json
from llmopt.method import Run
from llmopt.model.blocks import Block
from llmopt.model.computing import compute_type
from llmopt.parts import Part, register
from llmopt.prune.allocate import Units
from llmopt.prune.groups import members

POINTS, TIMES = 6, 7            # numbers of units at which a part is timed, and how often: the shortest time counts
Table = dict[str, dict[str, list[int]]]         # by the shape of a part: kept, numbers of units; nanoseconds


class Budget(Part, ABC):
    """Prices for the units of layer parts."""

    kind = "budget"

    @property
    def reads(self) -> tuple[str, ...]:
        """See Method.reads."""
        return ()

    @abstractmethod
    def priced(self, units: list[Units], views: list[Block], model: nn.Module, run: Run | None
               ) -> tuple[list[Units], dict[str, Any]]:
        """The units with their prices, and figures for the record. run: None while shapes alone are there."""


@register("parameters")
@dataclass(frozen=True)
class Parameters(Budget):
    """Weights and biases."""

    def priced(self, units: list[Units], views: list[Block], model: nn.Module, run: Run | None
               ) -> tuple[list[Units], dict[str, Any]]:
        return units, {}


@register("flops")
@dataclass(frozen=True)
class Flops(Budget):
    """Operations for each token of a text; where only channels leave, the same as parameters."""

    length: int = Field(2048, ge=1, description="tokens of the text")

    def priced(self, units: list[Units], views: list[Block], model: nn.Module, run: Run | None
               ) -> tuple[list[Units], dict[str, Any]]:
        known = {block.index: block for block in views}
        return [dataclasses.replace(u, prices=tuple(n * flops(known[u.layer], u, self.length) for n in u.allowed))
                for u in units], {}


@register("latency")
@dataclass(frozen=True)
class Latency(Budget):
    """Time on the machine that prunes, or by a table of times."""

    length: int = Field(512, ge=1, description="tokens that a part reads at once: a prompt; 1: as in generation")
    table: str | None = Field(None, description='a file with times, {"latency": ...} as in a record; null: measured')

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.table,) if self.table else ()

    def priced(self, units: list[Units], views: list[Block], model: nn.Module, run: Run | None
               ) -> tuple[list[Units], dict[str, Any]]:
        if run is None and self.table is None:
            return Flops(length=self.length).priced(units, views, model, run)
        known = {block.index: block for block in views}
        parts: dict[str, Units] = {}
        for u in units:
            parts.setdefault(shape(known[u.layer], u), u)
        table = read_table(self.table, list(parts)) if self.table else run.memory.remember(
            "latency", lambda: run.ranks.agree(self._measured(parts, model, run)))
        return [dataclasses.replace(u, prices=prices(table[shape(known[u.layer], u)], u)) for u in units], {
            "latency": table}

    def _measured(self, parts: dict[str, Units], model: nn.Module, run: Run) -> Table:
        found: Table = {}
        for block in each(model, run, "latency", edits=False, only={u.layer for u in parts.values()}):
            device = next(block.module.parameters()).device
            for name, u in parts.items():
                if u.layer == block.index:
                    steps = len(u.allowed) - 1
                    kept = sorted({u.allowed[round(part * steps / (POINTS - 1))] for part in range(POINTS)})
                    found[name] = {"kept": kept, "nanoseconds": [
                        shortest(work(block, u, n, self.length, compute_type(model), device), device) for n in kept]}
        return found


def heads_of(block: Block, u: Units) -> int:
    """Query heads that one unit stands for."""
    whole = {"attention": block.heads, "blocks": block.heads, "ffn": 0, "mlp": 0, "q_heads": u.index.shape[1],
             "kv_groups": block.heads // max(1, block.kv_heads)}
    return whole[u.kind]


def flops(block: Block, u: Units, length: int) -> int:
    """Operations for each token that leave with one unit; attention reads half of the text on average."""
    weights = sum(member.weights for member in members(block, u.kind)) * u.index.shape[1]
    return 2 * weights + heads_of(block, u) * 2 * block.head_dim * length


def shape(block: Block, u: Units) -> str:
    """A name for all parts of one shape."""
    sizes = " ".join(f"{into}x{out}" for into, out in products(block, u, 1))
    return f"{u.kind}: {len(u.scores)} of {sizes}, {heads_of(block, u)} x {block.head_dim}"


def products(block: Block, u: Units, count: int) -> list[tuple[int, int]]:
    """(in, out) of every matrix product that so many units take part in."""
    found = []
    for member in members(block, u.kind):
        size = member.index.shape[1] * u.index.shape[1] * count
        projection = member.projection
        found.append((size, projection.out_features) if member.columns else (projection.in_features, size))
    return found


def work(block: Block, u: Units, count: int, length: int, dtype: torch.dtype, device: torch.device
         ) -> Callable[[], None]:
    """The products of a part with so many units, on `length` tokens, and its attention."""
    pairs = [(torch.randn(length, into, dtype=dtype, device=device),
              torch.randn(out, into, dtype=dtype, device=device)) for into, out in products(block, u, count)]
    heads = heads_of(block, u) * count
    rows: Tensor | None = torch.randn(1, heads, length, block.head_dim, dtype=dtype, device=device) if heads else None

    def once() -> None:
        for x, weight in pairs:
            linear(x, weight)
        if rows is not None:
            scaled_dot_product_attention(rows, rows, rows, is_causal=True)

    return once


@torch.no_grad()
def shortest(once: Callable[[], None], device: torch.device) -> int:
    """The shortest of several times, in nanoseconds, after one that does not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for _ in range(TIMES + 1):
        wait()
        start = time.perf_counter_ns()
        once()
        wait()
        found.append(time.perf_counter_ns() - start)
    return min(found[1:])


def prices(row: dict[str, list[int]], u: Units) -> tuple[int, ...]:
    """Nanoseconds of each number of units that is allowed, between those of the row in proportion, never falling."""
    known = dict(zip(row["kept"], row["nanoseconds"], strict=True))
    rising, most = {}, 0
    for count in sorted(known):
        most = rising[count] = max(most, known[count])
    return tuple(_between(rising, count) for count in u.allowed)


def _between(known: dict[int, int], count: int) -> int:
    places = sorted(known)
    if count <= places[0]:
        return round(known[places[0]] * count / max(1, places[0]))
    for low, high in pairwise(places):
        if low <= count <= high:
            return known[low] + round((known[high] - known[low]) * (count - low) / (high - low))
    return round(known[places[-1]] * count / places[-1])


def read_table(name: str, shapes: list[str]) -> Table:
    """The times in a file, for these shapes of parts."""
    file = Path(name).expanduser()
    if not file.is_file():
        raise LlmoptError(f"budget.latency.table: there is no file {name}")
    held = load_json(file)
    table = held.get("latency") if isinstance(held, dict) else None
    if not isinstance(table, dict):
        raise LlmoptError(f'{name}: holds no times; expected {{"latency": {{SHAPE: {{"kept": [...], '
                          '"nanoseconds": [...]}}}, as in the record of a step')
    for wanted in shapes:
        if wanted not in table:
            raise LlmoptError(f"{name}: has no times of {wanted!r}{closest(wanted, table)}: is it of another model?")
        row = table[wanted]
        lists = [row.get(key) for key in ("kept", "nanoseconds")] if isinstance(row, dict) else [None]
        if not all(isinstance(found, list) and found and all(type(n) is int and n >= 0 for n in found)
                   for found in lists) or len(lists[0]) != len(lists[1]):
            raise LlmoptError(f"{name}: {wanted!r}: kept and nanoseconds, as many whole numbers each, expected")
    return {wanted: table[wanted] for wanted in shapes}
