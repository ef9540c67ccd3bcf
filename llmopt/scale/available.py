"""How much memory a process may still take: what the machine has left, or a control group (a container, a job).

A group is charged for the files read in it too, whose pages the system drops when memory is needed: they count as
free. Both versions of Linux's control groups are read.
"""
from collections.abc import Iterator
from pathlib import Path

import psutil

OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
FILES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
CACHE = {2: ("inactive_file", "active_file"), 1: ("total_inactive_file", "total_active_file")}      # in memory.stat


def available() -> int:
    """Bytes."""
    left = [_left(group, version) for group, version in _groups()]
    return max(0, min([psutil.virtual_memory().available, *(room for room in left if room is not None)]))


def _groups() -> Iterator[tuple[Path, int]]:
    """(folder, version) of the groups that this process is in, and of those around them."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:                                     # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):               # a container may see its own group as the root
            root, version = (ROOT, 2) if not controllers else (ROOT / controllers, 1)
            inner = root / path.lstrip("/")
            yield from ((group, version) for group in (inner, *inner.parents) if group.is_relative_to(root))


def _left(group: Path, version: int) -> int | None:
    """The memory that one group may still take; None: it has no limit, or there is no such group."""
    try:
        limit, used = ((group / name).read_text().strip() for name in FILES[version])
        charged = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + sum(int(charged[name]) for name in CACHE[version])
