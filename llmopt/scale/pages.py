"""Which pages of a piece of memory are the process's own, and which still those of a file: asked of the kernel.

A file that is mapped for the process alone gives a page of its own for each that is written to, however it is written.
"""
import mmap
from pathlib import Path

PAGEMAP = Path("/proc/self/pagemap")        # Linux: 64 bits for each page
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61


def private_bytes(address: int, size: int) -> int:
    """Bytes of a piece of memory on private pages; all of it where the system does not tell.

    Its first and last page may hold other things too: they count where there are no whole ones between them.
    """
    import numpy

    first, behind = -(-address // mmap.PAGESIZE), (address + size) // mmap.PAGESIZE
    if behind <= first:
        first = (address + size // 2) // mmap.PAGESIZE
        behind = first + 1
    try:
        with PAGEMAP.open("rb", buffering=0) as table:
            table.seek(8 * first)
            pages = numpy.frombuffer(table.read(8 * (behind - first)), numpy.uint64)
    except OSError:
        return size
    own = (pages & numpy.uint64(PRESENT | SWAPPED) != 0) & (pages & numpy.uint64(OF_FILE) == 0)
    return round(size * int(own.sum()) / (behind - first))
