"""Random generators whose streams cannot meet across splits: the split's name is hashed into the state."""

from hashlib import sha256
from random import Random

SPLITS = ("train", "calibration", "eval")


def generator(split: str, *tags: int | str) -> Random:
    """A generator that is a function of the split and the tags; an unknown split is refused."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    text = "|".join([split, *map(str, tags)])
    return Random(int.from_bytes(sha256(text.encode()).digest(), "big"))
