"""What happens to the entries that are not kept."""
from llmopt_kernels import NONE
from torch import Tensor

from llmopt.cache import Entries


def evict(entries: Entries, keep: Tensor) -> Entries:
    """They are dropped. keep: bool [G, T]."""
    return Entries(entries.keys, entries.values, entries.positions.masked_fill(~keep, NONE), entries.bias)
