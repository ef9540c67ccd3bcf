"""A walk with two streams: through the model as it is edited, and beside it through the model as the walk found it.

What a weight should write is what the unedited model writes there, and its inputs are not those of the unedited model
any more. `visit.dense` has the inputs of both apart: token by token, what is missing in those that the weight gets.
"""
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import Tensor, nn

from llmopt.calibration.calls import record_calls
from llmopt.calibration.walk import Places, Visit
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, layer_list
from llmopt.scale.memory import Memory

LISTS = 6           # of activations held at once: both streams before and behind a block, `dense`, the masks


def visits_beside(model: nn.Module, run: Run, label: str, places: Callable[[Block], Places]) -> Iterator[Visit]:
    """`walk.visits` of shared data for a caller who edits; `visit.dense`: what `places` of the unedited block read.

    The second stream runs through a block before it is edited, or before what a run that was cut off had made of it is
    put in place.
    """
    if not run.batches:
        raise LlmoptError("this step needs calibration data and there is none")
    memory, count = run.memory.editing().holding(LISTS), len(layer_list(model))
    done = {index for index in range(count) if memory.finished(index)}
    stop = max((index + 1 for index in range(count) if index not in done), default=0)
    for index in range(stop, count):
        memory.restored(model, index)
    if stop:
        streams = _Streams(model, run.own_batches, memory, places)
        yield from streams.through(run.progress(range(stop), label), done)


class _Streams:
    """The hidden states in front of a block in both streams, [B, T, E] per batch."""

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], memory: Memory,
                 places: Callable[[Block], Places]):
        self.model, self.memory, self.places = model, memory, places
        self.edited, self.calls = record_calls(model, batches, memory)
        self.dense = memory.keep(x.clone() for x in self.edited)        # apart from now on, in the forecast as well
        self.masks = [batch["attention_mask"].bool() for batch in batches]

    def through(self, indices: Iterable[int], done: Collection[int]) -> Iterator[Visit]:
        """The visits of the blocks that are not done."""
        for index in indices:
            if index in done:
                with self.memory.reading.block(self.model, index):
                    self.dense = self.memory.keep(self._visit(index, self.dense).outputs())
                self.memory.restored(self.model, index)
            with (self.memory.reading if index in done else self.memory).block(self.model, index):
                visit = self._visit(index, self.edited)
                if index not in done:
                    visit.dense = self._unedited(index)
                    visit.wanted = self.dense
                    yield visit
                    visit.dense = visit.wanted = None
                self.edited = visit.outputs_after_edit = self.memory.keep(visit.outputs())
                visit.inputs = []                   # the caller holds the visit while the next one is prepared

    def _visit(self, index: int, hidden: list[Tensor]) -> Visit:
        return Visit(self.model, blocks(self.model)[index], hidden, self.calls[index], self.masks)

    def _unedited(self, index: int) -> dict[str, list[Tensor]]:
        """What the places of a block read in the second stream, which is behind the block afterwards."""
        visit = self._visit(index, self.dense)
        self.dense = self.memory.keep(visit.record(self.places(visit.block), self.memory.keeper()))
        return visit.dense
