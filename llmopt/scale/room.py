"""What the parts of a step take of the memory, told from shapes: each method brings its own, forecast.py adds up.

All figures are bytes of private memory (llmopt/gauge.py).
"""
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Scene:
    """The workload of a run. shapes: (B, T) of every calibration batch; padded: whether any of them needs a mask.

    activations: bytes of them that stay in memory; None: all. streamed: one block's weights are there at a time.
    converted: names of the weights that are not mapped from their files as they are. shard: bytes of one at most.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    padded: bool = False
    activations: int | None = None
    streamed: bool = False
    converted: frozenset[str] = frozenset()
    shard: int = 2 * 10**9

    @property
    def largest(self) -> tuple[int, int]:
        return max(self.shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))

    @property
    def tokens(self) -> int:
        return sum(rows * length for rows, length in self.shapes)


@dataclass(frozen=True)
class Room:
    """The memory that a step takes for one block, or for the whole model.

    rewritten: modules whose weights it changes: private from then on. stays: codes and the like, kept beside them.
    passes: while it works on the block, at most. whole: before that, while it looks at the dense block, or at all of
    them. sets: how many times the activations of all calibration data are held.
    """

    rewritten: tuple[nn.Module, ...] = ()
    stays: int = 0
    passes: int = 0
    whole: int = 0
    sets: int = 0
