"""Zeros that stay: single weights that pruning has set to 0 (`units: [weights]`, 2:4 patterns), by whatever tool.

A mask is told by the weight itself, so that it outlives files: trained weights hold hardly a zero, those that were
quantized before (GGUF files, made dense) a ninth at 4 bits and a quarter at 3, masks of use a half and more. Solvers
that move an error from one entry to others give it to entries that are not held alone, as SparseGPT does where it
rounds in the same sweep (arXiv:2301.00774).
"""
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

MASKED = 0.4            # of the entries of a weight that are exactly 0: from here on they are a mask
Keep = Literal["auto"] | bool


def live(weight: Tensor, keep: Keep) -> Tensor | None:
    """Where `weight` may be other than 0 [out, in] bool; None: everywhere. keep: `keep_zeros` of a step."""
    found = weight != 0
    held = found.numel() - int(found.sum())
    return found if held and keeps(keep, held / found.numel()) else None


def keeps(keep: Keep, share: float) -> bool:
    """Do zeros stay in a weight of which they are such a share?"""
    return keep is True or keep == "auto" and share >= MASKED


def held(live: Tensor | None) -> dict[str, int]:
    """The figure that the record of a weight has of the zeros that stay in it; live: see the function."""
    return {} if live is None else {"zeros": int((~live).sum())}


def told(figures: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> list[str]:
    """A note on the weights [by name] whose zeros were held; figures: what is known of each, its `zeros` if they were.
    """
    counts = {name: of["zeros"] for name, of in figures.items() if "zeros" in of}
    share = sum(counts.values()) / max(1, sum(sizes[name] for name in counts))
    return [f"zeros of {len(counts)} weights stay zeros ({share:.1%} of these)"] if counts else []
