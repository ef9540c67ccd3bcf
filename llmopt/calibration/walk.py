"""Going through a model's blocks one after the other, with calibration data or without: the only such loops there are.

Weights come and go with the run's Memory; blocks that a run which was cut off had finished are passed over.
"""
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call

from llmopt.calibration.calls import record_calls
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, layer_list
from llmopt.model.outside import Outside
from llmopt.progress import Progress, silent
from llmopt.runtime.attention_rows import Rows, attention_rows
from llmopt.scale.memory import OUTSIDE, Memory

Places = dict[str, nn.Module]          # parts of a block by a name


class _Enough(Exception):
    """Leaves a forward the rest of which nobody reads."""


def _leave(*_: Any) -> None:
    raise _Enough


@dataclass
class Visit:
    """One stop of the walk: a block and everything needed to run it over the calibration set.

    inputs: hidden states [B, T, E] per batch. outputs_after_edit: those behind the edited block, filled when the walk
    goes on. Padding never reaches an observer. A process without a row of the data has no batch.
    dense: where the walk has a second stream, through the blocks as it found them, what this block reads in that one:
    by the name of a place, [N, features] for each batch; wanted: what it writes there, [B, T, E] for each batch.
    """

    model: nn.Module
    block: Block
    inputs: list[Tensor]
    calls: list[tuple[tuple, dict]]     # the other arguments of the block, per batch
    masks: list[Tensor]                 # [B, T] bool, True at real tokens
    outputs_after_edit: list[Tensor] = field(default_factory=list)
    dense: dict[str, list[Tensor]] | None = None
    wanted: list[Tensor] | None = None

    def outputs(self) -> Iterator[Tensor]:
        """The block's outputs [B, T, E], batch by batch, with its present weights."""
        for index in range(len(self.inputs)):
            with torch.no_grad():
                out = self.forward(index)
            yield out

    def forward(self, index: int, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The block's output [B, T, E] for one batch; weights: in place of parameters, by their name in the block.

        Differentiable in `weights` where the caller has gradients enabled.
        """
        x, args, kwargs = self._call(index)
        if weights is None:
            return _first(self.block.module(x, *args, **kwargs))
        return _first(functional_call(self.block.module, weights, (x, *args), kwargs))

    def _call(self, index: int) -> tuple[Tensor, tuple, dict]:
        x, (args, kwargs), weight = self.inputs[index], self.calls[index], next(self.block.module.parameters(), None)
        if weight is not None:                                      # all of it may wait in files, on the CPU
            x, args, kwargs = send_to_device((x, args, kwargs), weight.device)
        return x, args, kwargs

    @torch.no_grad()
    def attention(self, see: Callable[[int, Rows], None], rows: slice | list[slice] | None = None) -> None:
        """Hand the attention rows of every batch to `see(batch, rows)`; the block runs only so far.

        rows: the queries that are wanted, of all batches or of each. The block gets its padding as a mask [B, T], not
        the mask of all pairs that was recorded; a block without attention shows nothing.
        """
        if self.block.attention is None:
            return
        handle = self.block.attention.register_forward_hook(_leave)
        try:
            for index, mask in enumerate(self.masks):
                x, args, kwargs = self._call(index)
                bound = inspect.signature(self.block.module.forward).bind(x, *args, **kwargs)
                bound.arguments["attention_mask"] = None if bool(mask.all()) else mask.to(x.device)
                wanted = rows[index] if isinstance(rows, list) else rows
                with attention_rows(self.model, partial(see, index), wanted), suppress(_Enough):
                    self.block.module(*bound.args, **bound.kwargs)
        finally:
            handle.remove()

    def observe(self, readers: dict[str, Callable[[Tensor], None]], others: Places | None = None,
                weights: dict[str, Tensor] | None = None) -> None:
        """Feed `readers[projection name]` the real tokens' inputs [N, in_features]; the block runs only so far.

        others: places that can be read besides the projections. weights: as in `forward`.
        """
        places = {p.name: p.module for p in self.block.projections()} | (others or {})
        waiting: set[str] = set()

        def see(name: str, x: Tensor) -> None:
            readers[name](_real(x, mask))
            waiting.discard(name)
            if not waiting:
                raise _Enough

        with _watching({name: places[name] for name in readers if name in places}, see):
            for index, mask in enumerate(self.masks):       # noqa: B007  `see` reads the mask
                waiting.update(readers.keys() & places.keys())
                with suppress(_Enough), torch.no_grad():
                    self.forward(index, weights)

    @torch.no_grad()
    def calls_of(self, module: nn.Module) -> Iterator[tuple[tuple, dict, Tensor]]:
        """(arguments, keyword arguments, mask [B, T]) of a module inside the block, batch by batch; it runs so far."""
        seen: list[tuple[tuple, dict]] = []

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append((args, kwargs))
            raise _Enough

        handle = module.register_forward_pre_hook(see, with_kwargs=True)
        try:
            for index, mask in enumerate(self.masks):
                with suppress(_Enough):
                    self.forward(index)
                yield *seen.pop(), mask
        finally:
            handle.remove()

    def record(self, places: Places, hold: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """The block's outputs, batch by batch; the inputs of the places are put into `dense`, as `hold` keeps them."""
        self.dense = {name: [] for name in places}

        def see(name: str, x: Tensor) -> None:
            self.dense[name].append(hold(_real(x, mask)))

        with _watching(places, see), torch.no_grad():
            for index, mask in enumerate(self.masks):       # noqa: B007  `see` reads the mask
                yield self.forward(index)


def each(model: nn.Module, run: Run, label: str, edits: bool = True,
         only: Collection[int] | None = None) -> Iterator[Block]:
    """The blocks in order, each with its weights there; edits: False where the caller changes none of them.

    only: the indices to go through. Of a run that was cut off, edited blocks that were done are passed over: what is
    learned of a block while it is edited belongs into the block (Quantized.figures), not into a list of the caller's.
    """
    memory = run.memory.editing() if edits else run.memory.reading
    for index in run.progress([i for i in range(len(layer_list(model))) if only is None or i in only], label):
        if not memory.restored(model, index):
            with memory.block(model, index):
                yield blocks(model)[index]


def outside(model: nn.Module, run: Run) -> Iterator[Outside]:
    """The parts that belong to no block, their weights there to be changed; none if a resumed run had done that."""
    memory = run.memory.editing()
    if not memory.restored(model, OUTSIDE):
        with memory.outside(model, edits=True):
            yield Outside(model)


def reshaped(model: nn.Module, run: Run, label: str, only: Collection[int]) -> Iterator[Block]:
    """The blocks at the indices `only`, for a caller who quickly changes their shapes."""
    memory = run.memory.editing(again=True)
    for index in run.progress(sorted(only), label):
        with memory.block(model, index):
            yield blocks(model)[index]


def visits(model: nn.Module, run: Run, label: str, edits: bool = True, shared: bool = False) -> Iterator[Visit]:
    """`walk` over the run's calibration data; `edits` and what a resumed run passes over: as in `each`.

    shared: each process sees its own rows, maybe none, and the caller sums what it counts over `run.ranks`.
    """
    refuse_without_data(run)
    memory = run.memory.editing() if edits else run.memory.reading
    return walk(model, run.own_batches if shared else run.batches, run.progress, label, memory)


def refuse_without_data(run: Run) -> None:
    """Raise LlmoptError where there is no calibration data."""
    if not run.batches:
        raise LlmoptError("this step needs calibration data and there is none")


def walk(model: nn.Module, batches: list[dict[str, Tensor]], progress: Progress = silent,
         label: str = "blocks", memory: Memory = Memory()) -> Iterator[Visit]:    # noqa: B008  it holds nothing
    """Visit the blocks in order; each one's inputs are the outputs of the (edited) blocks before it.

    batches: [{"input_ids": [B, T], "attention_mask": [B, T]}, ...]. A walk that edits nothing repeats the plain
    forward exactly. The caller edits `visit.block` between two visits.
    """
    done = {index for index in range(len(layer_list(model))) if memory.restored(model, index)}
    ahead = [index for index in range(len(layer_list(model))) if index not in done]
    if not ahead:
        return
    inputs, calls = record_calls(model, batches, memory)
    masks = [batch["attention_mask"].bool() for batch in batches]
    for index in progress(range(ahead[-1] + 1), label):
        with (memory.reading if index in done else memory).block(model, index):
            visit = Visit(model, blocks(model)[index], inputs, calls[index], masks)
            if index not in done:
                yield visit
            inputs = visit.outputs_after_edit = memory.keep(visit.outputs())


@contextmanager
def _watching(places: Places, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show what each place reads, by its name, just before it does."""
    handles = [module.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
               for name, module in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """The real tokens [N, F] of `x`."""
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1)]


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
