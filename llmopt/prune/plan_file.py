"""A plan as a file: what stays of every layer, written beside a checkpoint, read back by `prune.plan`.

    {"layers": [{}, {"drop": true}, {"skip": ["mlp"], "kv_groups": [0, 2]}, {"ffn": 1216}, ...]}

An entry for each layer of the model as it was: `ffn`, `kv_groups` and `heads` (query heads) are how many stay, or
which; what an entry does not name stays whole. Entries may be changed by hand.
"""
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, closest
from llmopt.files.plans import FILE, read_part

KINDS = ("ffn", "kv_groups", "heads")
PARTS = ("attention", "mlp")
Entry = dict[str, Any]


def file_of(path: str) -> Path:
    """The file that `path` means: a plan, or the folder of a checkpoint that has one."""
    given = Path(path).expanduser()
    return given / FILE if given.is_dir() else given


def read_layers(path: str) -> list[Entry]:
    """The entries of a file; raises LlmoptError for one that holds no plan of layers."""
    file = file_of(path)
    entries = read_part(file, "layers", list, '[{"ffn": 1216}, {"drop": true}]', "path")
    for index, entry in enumerate(entries):
        _check(entry, f"{file}: layer {index}")
    return entries


def _check(entry: Any, where: str) -> None:
    known = ("drop", "skip", *KINDS)
    if not isinstance(entry, dict):
        raise LlmoptError(f"{where}: {str(entry)[:60]} given, an object such as {{\"ffn\": 1216}} expected")
    for key, value in entry.items():
        if key not in known:
            raise LlmoptError(f"{where}: {key!r} is not a key{closest(key, known)}. Choices: {', '.join(known)}")
        if key == "drop" and not isinstance(value, bool):
            raise LlmoptError(f"{where}: drop is {str(value)[:60]}, true or false expected")
        if key == "skip" and not (isinstance(value, list) and all(part in PARTS for part in value)):
            raise LlmoptError(f"{where}: skip is {str(value)[:60]}, some of {', '.join(PARTS)} expected")
        if key in KINDS and not (_whole(value) or isinstance(value, list) and all(map(_whole, value))):
            raise LlmoptError(f"{where}: {key} is {str(value)[:60]}, how many stay, or a list of them, expected")
    if {"heads", "kv_groups"} <= entry.keys() and not all(isinstance(entry[k], list) for k in ("heads", "kv_groups")):
        raise LlmoptError(f"{where}: heads and kv_groups expected as two lists, or one of them alone")


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def layers_of(records: Iterable[Mapping[str, Any]]) -> list[Entry] | None:
    """The plan of all pruning steps of a report together, ready for JSON; None where no layer has lost anything."""
    plan: list[Entry] = []
    left: list[int] = []                                    # places in the plan of the layers that are still there
    for meta in (record["meta"] for record in records if record["method"].startswith("prune.")):
        if "layers" not in meta:
            continue
        plan, left = plan or [{} for _ in meta["layers"]], left or list(range(len(meta["layers"])))
        for told, dense in zip(meta["layers"], meta["dense"], strict=True):
            place = left[told["layer"]]
            plan[place] = {"drop": True} if told["dropped"] else plan[place] | _kept(plan[place], told, dense)
        left = [index for index, told in zip(left, meta["layers"], strict=True) if not told["dropped"]]
    return plan if any(plan) else None


def _kept(before: Entry, told: Mapping[str, Any], dense: Mapping[str, Any]) -> Entry:
    """What a step's record tells of a layer, by the numbers of the model as it was before all steps."""
    found: Entry = {"skip": told["skip"]} if told["skip"] else {}
    if 0 < told["ffn"] < dense["width"]:
        found["ffn"] = told["ffn"]
    if 0 < len(told["heads"]) < dense["heads"]:
        found |= {kind: [before[kind][i] for i in told[kind]] if kind in before else told[kind]
                  for kind in ("kv_groups", "heads") if kind in told}
    return found
