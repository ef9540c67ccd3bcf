"""Which weights are quantized, at how many bits and in what groups: decided by name and shape, before data is read."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from llmopt.errors import LlmoptError, nearest
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.names import is_cut, names_of

KERNELS = (128, 64, 32)     # group sizes that inference kernels are written for
DENSE = 16    # this many bits: the weight is left as it is


class Choice(NamedTuple):
    """What a weight may become: its bits, and the columns that share a scale."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits}/{self.group_size}"


@dataclass(frozen=True)
class Target:
    """One weight matrix to be quantized; bits None: not decided yet.

    fixed, sized: its bits, its group size are given by `overrides`; scheme: its kind of numbers is, by a name.
    block, group: names of the block and of the first projection that reads the same input. key: its parameter's name.
    at_once: plain transformers will unpack it while it loads. expert: which one it belongs to; None: to all tokens.
    """

    name: str
    key: str
    block: str
    group: str
    out: int
    columns: int
    group_size: int
    bits: int | None = None
    fixed: bool = False
    sized: bool = False
    scheme: str | None = None
    at_once: bool = False
    expert: int | None = None

    @property
    def size(self) -> int:
        return self.out * self.columns

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else self.columns // self.group_size

    def at(self, bits: int, group_size: int | None = None) -> "Target":
        """This target at `bits` (and in groups of another size), unless its bits are fixed."""
        return self if self.fixed else replace(self, bits=bits, group_size=group_size or self.group_size)


def targets(model: nn.Module, ignore: Iterable[str], overrides: dict[str, dict], group_size: int,
            sizes: Iterable[int] = ()) -> list[Target]:
    """The projections of all blocks that are not ignored, with the settings that names decide.

    sizes: of which the largest that divides its columns stands in for a group size that does not.

    A name matches a module when it is its full name, a glob, or the end of its name; a parent stands for its children.
    Of several overrides that match, the last one holds; at 16 bits it leaves a weight dense, as `ignore` does. A scheme
    has been spelt out (kinds.py); nothing that was said before it holds beside it.
    """
    found_in = [(block, block.weights()) for block in blocks(model)]
    names = names_of(model)
    skipped = _matching(ignore, names, "ignore")
    special = {pattern: _matching([pattern], names, "overrides") for pattern in overrides}
    found, known, unpacked = [], [], spec_of(model).at_once
    for block, group, p in [(b, g, p) for b, groups in found_in for g in groups for p in g]:
        if _within(p.name, skipped):
            continue
        given = _settled(entry for pattern, entry in overrides.items() if _within(p.name, special[pattern]))
        known.append(p.name)
        if given.get("bits") == DENSE:
            continue
        sized = "group_size" in given
        width = given["group_size"] if sized else _dividing(group_size, sizes, p.in_features)
        target = Target(p.name, p.key, block.name, group[0].name, p.out_features, p.in_features, width, sized=sized,
                        scheme=given.get("scheme"), at_once=unpacked or p.expert is not None, expert=p.expert)
        if target.scheme is None:
            check_divides(target)
        found.append(replace(target, bits=given["bits"], fixed=True) if "bits" in given else target)
    for pattern, matched in special.items():
        if not any(_within(name, matched) for name in known) and not is_cut(model):
            raise LlmoptError(f"overrides: {pattern!r} matches no weight that is quantized{nearest(pattern, known)}")
    return found


def _settled(entries: Iterable[dict]) -> dict:
    """What several overrides of one weight come to."""
    given: dict = {}
    for entry in entries:
        given = dict(entry) if "scheme" in entry or "scheme" in given else given | entry
    return given


def _matching(patterns: Iterable[str], names: list[str], key: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if n == pattern or n.endswith("." + pattern) or fnmatchcase(n, pattern)}
        if not hits:
            leaves = {n.rpartition(".")[2] for n in names} - {str(i) for i in range(1000)}
            close = nearest(pattern, names).split(". Choices")[0] or nearest(pattern, leaves)
            raise LlmoptError(f"{key}: no module of this model matches {pattern!r}{close}")
        matched |= hits
    return matched


def _within(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts) + 1))


def _dividing(size: int, others: Iterable[int], columns: int) -> int:
    """`size` if it divides the columns, else the largest of the others that does, if there is one."""
    fitting = [other for other in others if other > 0 and columns % other == 0] or [-1] * (-1 in others)
    return size if size == -1 or columns % size == 0 or not fitting else max(fitting)


def check_divides(target: Target) -> None:
    """Raise LlmoptError unless the group size divides the columns, naming the nearest sizes that do."""
    size, columns = target.group_size, target.columns
    if size == -1 or columns % size == 0:
        return
    served = [d for d in KERNELS if columns % d == 0]
    divisors = [d for d in range(1, columns + 1) if columns % d == 0 and d not in served]
    nearest_two = [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1]
    leaf = (target.name if target.expert is None else target.key).rpartition(".")[2]
    kernels = f"{', '.join(map(str, served))} (sizes that inference kernels take), else " if served else ""
    raise LlmoptError(f"{target.name}: group_size {size} does not divide its {columns} input features. Use {kernels}"
                      f"{', '.join(map(str, nearest_two))}; -1 is one scale per output channel. Set "
                      f"group_size, or overrides: {{{leaf}: {{group_size: ...}}}}")


def average_bits(decided: list[Target]) -> float:
    """Mean bits of a code over all quantized weights, scales not counted."""
    return sum(t.size * t.bits for t in decided) / max(1, sum(t.size for t in decided))


def effective_bits(decided: list[Target], extra: Callable[[Target], tuple[int, int]]) -> float:
    """Mean bits per weight with scales and zero points; extra: (bits beside a run of codes, rows that share them; 0:
    all).
    """
    total = 0
    for t in decided:
        beside, rows = extra(t)
        lines = -(-t.out // rows) if rows else 1
        total += t.size * t.bits + (0 if t.bits == DENSE else lines * t.groups * beside)
    return total / max(1, sum(t.size for t in decided))
