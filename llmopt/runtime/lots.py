"""Numbers drawn by lot from what something is, not from when it is asked: alike for a text alone and in a batch."""
from torch import Tensor

STEPS = ((30, 0xBF58476D1CE4E5B9 - 2 ** 64), (27, 0x94D049BB133111EB - 2 ** 64))         # as signed 64-bit integers
STRIDE = 0x9E3779B97F4A7C15 - 2 ** 64


def mixed(x: Tensor) -> Tensor:
    """Int64 numbers, of which any two differ in about half of their bits afterwards."""
    x = (x + 1) * STRIDE
    for bits, factor in STEPS:
        x = (x ^ (x >> bits & (1 << 64 - bits) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def lots(x: Tensor) -> Tensor:
    """Float32 numbers from [0, 1), each from an int64 number."""
    return (mixed(x) >> 40 & 0xFFFFFF).float() / 2 ** 24
