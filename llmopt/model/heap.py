"""Memory that a process has freed, given back to the system."""
import ctypes


def give_back_freed() -> None:
    """Have the C library return freed memory: it keeps pieces below 32 MB, and scattered ones add up block by block."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):        # not glibc
        return
