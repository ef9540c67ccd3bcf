"""Several processes that share one run; one process alone is the case that does nothing and costs nothing.

    torchrun --nproc-per-node 2 -m llmopt compress --recipe R --output OUT

Each has the whole model; calibration rows, rows of weights and evaluation requests are shared. What is known after a
block is the same everywhere, and rank 0 alone writes and talks.

The group is not torch's default one, so accelerate has no part in it: libraries that find a default group begin
collectives of their own (compressed-tensors while it loads), which hang where one rank alone loads or verifies.
"""
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.scale.launch import Lost, count

PATIENCE = timedelta(days=30)       # rank 0 may write or verify for hours; a rank that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Every method must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")      # where the backend wants its tensors
    group: Any = None                               # torch's process group

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and talks."""
        return self.rank == 0

    def span(self, count: int, rank: int | None = None) -> slice:
        """The slice of `count` things that is this rank's (or another's): all get as many, or one more or less."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def share(self, items: Sequence) -> Sequence:
        """This rank's part of `items`; the parts of all ranks, one after the other, are `items`."""
        return items[self.span(len(items))]

    def share_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """This rank's part of batches {name: [B, T]}: whole ones, which give the same bits as in one process.

        Where there are fewer batches than ranks they are cut into rows; a rank for which no row is left has no batch.
        """
        if len(batches) >= self.size:
            return self.share(batches)
        own, first, found = self.span(sum(len(batch["input_ids"]) for batch in batches)), 0, []
        for batch in batches:
            rows = slice(max(own.start - first, 0), max(own.stop - first, 0))
            first += len(batch["input_ids"])
            if len(batch["input_ids"][rows]):
                found.append({name: tensor[rows] for name, tensor in batch.items()})
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            moved = tensor.to(self.device).contiguous()
            with _together():
                self.group.allreduce([moved]).wait()
            tensor.copy_(moved)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The values that `tensor` has on the rank `source`, in place; any type, bit for bit."""
        if self.size > 1:
            moved = tensor.to(self.device).contiguous()
            with _together():
                self.group.broadcast(moved.view(-1).view(torch.uint8), source).wait()
            if self.rank != source:
                tensor.copy_(moved)
        return tensor

    def rows(self, part: Tensor, count: int) -> Tensor:
        """[count, ...] of which every rank holds the rows `span(count)`: `part`."""
        if self.size == 1:
            return part
        whole = part.new_empty(count, *part.shape[1:])
        whole[self.span(count)] = part
        for rank in range(self.size):
            self.broadcast_(whole[self.span(count, rank)], rank)
        return whole

    def each_of(self, own: Sequence[Tensor], like: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """(tensor [n, in], whether it is this rank's own) of every rank, one rank after the other.

        like: something [..., in] of their type.
        """
        for rank, lengths in enumerate(self.gather([len(tensor) for tensor in own])):
            for index, length in enumerate(lengths):
                mine = rank == self.rank
                yield self.broadcast_(own[index] if mine else like.new_empty(length, like.shape[-1]), rank), mine

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (plain data or small tensors on the CPU), by rank."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(own)
        parts = [own if rank == self.rank else torch.empty(length, dtype=torch.uint8)
                 for rank, length in enumerate(self.sum_(lengths).tolist())]
        return [pickle.loads(self.broadcast_(part, rank).numpy().tobytes()) for rank, part in enumerate(parts)]

    def totals(self, counts: dict[str, float]) -> dict[str, float]:
        """The sum of each count over all ranks."""
        found = self.gather(counts)
        return {name: sum(each[name] for each in found) for name in counts}

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank: where all do the same work, the last bit must not depend on the machine."""
        return self.gather(value if self.is_main else None)[0]

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:           # what the backends raise when a connection is closed
        raise Lost("another process of this run has ended; if it did not say why, it was killed (by the system, when "
                   "memory runs out)") from error


def join(device: str = "cpu") -> Ranks:
    """Join the processes that the launcher has started; gloo for a model on the CPU, nccl on CUDA, one GPU for each."""
    if count() == 1:
        return Ranks()
    if device.startswith("cuda:"):
        raise LlmoptError(f"{device}: several processes take one GPU each; give cuda")
    from torch.distributed import _dist2

    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    with _together():
        group = _dist2.new_group("gloo" if place.type == "cpu" else "nccl", PATIENCE, place)
    return Ranks(group.rank(), group.size(), place, group)
