"""A plan as a file: the bits and the group size of every weight, written beside a checkpoint, read back by `plan`.

    {"modules": {"model.layers.0.mlp.down_proj": {"bits": 3, "group_size": 64}, ...}}

Entries may be changed by hand; 16 bits leave a weight as it is. A plan names each weight that is quantized, no other.
"""
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, closest
from llmopt.files.plans import read_part
from llmopt.quant.plan import DENSE, Choice, Target, check_divides

BITS = (*range(2, 9), DENSE)


def read_plan(name: str) -> dict[str, Choice]:
    """{weight: its choice} from a file; raises LlmoptError for one that holds no plan."""
    entries = read_part(Path(name).expanduser(), "modules", dict, '{WEIGHT: {"bits": 3, "group_size": 64}}', "plan")
    return {weight: _choice(entry, f"{name}: {weight}") for weight, entry in entries.items()}


def _choice(entry: Any, place: str) -> Choice:
    known = entry if isinstance(entry, dict) else {}
    bits, size = known.get("bits"), known.get("group_size", -1)
    if type(bits) is not int or bits not in BITS:
        raise LlmoptError(f"{place}: bits {bits!r} given, an integer from 2 to 8, or {DENSE} (as it is), expected")
    if type(size) is not int or size < 1 and size != -1:
        raise LlmoptError(f"{place}: group_size {size!r} given, a whole number from 1, or -1 (one scale per output "
                          "channel), expected")
    return Choice(bits, size)


def planned_by(name: str, found: Iterable[Target]) -> list[Target]:
    """The targets as a file wants them; those at 16 bits are left out, those with a scheme of their own as they are.

    Raises LlmoptError for a plan of other weights, and for groups that do not divide a weight's columns.
    """
    plan, found = read_plan(name), list(found)
    names = [target.name for target in found if not target.scheme]
    for target in names:
        if target not in plan:
            raise LlmoptError(f"{name}: says nothing of {target}, which is quantized: is it the plan of another model? "
                              f"To leave a weight as it is, give it {DENSE} bits")
    for weight in plan:
        if weight not in names:
            raise LlmoptError(f"{name}: {weight} is no weight that is quantized here{closest(weight, names)}: is it "
                              "the plan of another model, or of other names in ignore and overrides?")
    made = [target if target.scheme else replace(target, bits=plan[target.name].bits, fixed=True,
                                                 group_size=plan[target.name].group_size) for target in found]
    for target in made:
        check_divides(target)
    return [target for target in made if target.bits != DENSE]


def plans_of(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The plan, ready for JSON, of the step of a report that shared out bits, or gave weights different ones."""
    for meta in (record["meta"] for record in records if record["method"].startswith("quant.")):
        plan = {name: {"bits": told["bits"], "group_size": told["group_size"]}
                for name, told in meta["modules"].items() if "scheme" not in told}
        if "allocation" in meta or len({tuple(entry.values()) for entry in plan.values()}) > 1:
            yield {"modules": plan}
