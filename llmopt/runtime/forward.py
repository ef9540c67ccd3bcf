"""What the forward under way needs to know."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from llmopt.runtime.cache import LlmoptCache


class Forward(threading.local):
    """The state of one forward of an attached model: each thread has its own, and a copied model starts without one.

    frozen: nothing is compressed in this thread, new tokens attend densely; recording: the kv method sees their queries
    all the same. rehearsing: no weight may be read.
    """

    def __init__(self) -> None:
        self.frozen = self.recording = False
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Forget the forward before; `tokens` are coming in this one."""
        self.cache: LlmoptCache | None = None
        self.tokens = tokens
        self.rehearsing = False
        self.hidden: Tensor | None = None               # what the layer under way reads, if the evictor asks for it
        self.record: Any = None                         # the evictor's, for `condense`
        self.due = False                                # the evictor acts at its end
        self.packs = False                              # the store does
        self.plan: dict[Any, Any] = {}                  # decided once by the kv method, by batch row and name
        self.pairs: dict[int, Any] = {}                 # by layer, which experts its tokens go to, see gates.py
        self.shared: dict[Any, Any] = {}                # what methods hand on from layer to layer
        self.replayed: dict[Any, Any] = {}              # scores of what was read again, by scorer and batch row
        self.masks: dict[int, Tensor | None] = {}       # decided once, see `mask_from`
        self.before: tuple[Tensor | None, ...] = ()     # what the cache knew of its tokens when the forward began

    def mask_from(self, start: int, mask: Tensor | None) -> Tensor | None:
        """`mask` [B, seen] without its columns before `start`; None where it hides none of the others."""
        if mask is None:
            return None
        if start not in self.masks:
            late = mask[:, start:].bool()
            self.masks[start] = None if bool(late.all()) else late
        return self.masks[start]

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Inside, other forwards may run; afterwards this one goes on as it was."""
        before = dict(self.__dict__)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def __reduce__(self) -> tuple:
        return Forward, ()
