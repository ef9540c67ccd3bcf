"""What the forward under way needs to know."""
import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from llmopt.runtime.cache import LlmoptCache


class Forward(threading.local):
    """The state of one forward of an attached model: each thread has its own, and a copied model starts without one.

    frozen: nothing is compressed in this thread, new tokens attend densely.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Forget the forward before; `tokens` are coming in this one."""
        self.cache: LlmoptCache | None = None
        self.tokens = tokens
        self.due = False                                # the evictor acts at its end
        self.packs = False                              # the store does
        self.plan: dict[int, Any] = {}                  # decided once by the kv method, by batch row
        self.shared: dict[Any, Any] = {}                # what methods hand on from layer to layer
        self.before: tuple[Tensor | None, ...] = ()     # what the cache knew of its tokens when the forward began

    def __reduce__(self) -> tuple:
        return Forward, ()
