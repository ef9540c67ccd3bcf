"""llmopt.json, what a checkpoint says about itself: read, and held against its shape before anybody trusts it."""
from pathlib import Path
from typing import Any

import torch

from llmopt.errors import LlmoptError, naming
from llmopt.files.checks import check_config, read_json, refusals
from llmopt.files.json_shapes import COUNT, NUMBER, SIZE, check_shape, finite
from llmopt.method import Method, Record
from llmopt.model.loading import read_config
from llmopt.model.skeleton import skeleton
from llmopt.parts import build, names
from llmopt.runtime.attach import RuntimeMethod
from llmopt.specs import ModelSpec

FORMAT_VERSION, MAX_STEPS = 1, 50
FILE = "llmopt.json"
# A shape is a type, a range of integers, `finite`, [each item], (item, item), or {key: value}: `?` after a key that may
# be missing, `str` for the keys that are not named.
META = {"modules?": {str: {"bits": finite, str: object}}, "shares?": [[finite]], "bits?": finite, "notes?": [str],
        str: object}
FACTS = {
    "format_version": COUNT, "versions": {"llmopt": str, str: str}, "base_model": str, "base_repo?": str | None,
    "base_ancestor?": str | None,
    "base_told?": [str], "base_licence": str | None, "base_licence_more?": {str: str}, "recipe?": dict | None,
    "format": str, "bytes": SIZE, "loads_with": {"transformers": str, str: str}, "changes?": [str],
    "calibration?": {"samples?": COUNT, "tokens?": COUNT},
    "records?": [{"method": str, "fields": {str: object}, "meta": META}], "table?": [(str, str, str)],
    "scores?": {str: [(str, str, NUMBER)]}, "errors?": {str: [(str, str, NUMBER)]}, str: object,
}
RUN = {"seed": int, "calibration_sha256": str | None, "calibration": dict, "made_from": dict | None,
       "parameters": (COUNT, COUNT), "dense_bytes": SIZE, "predicted_bytes": int | None,
       "cache_bytes_per_token": (NUMBER, NUMBER), "records": list, str: object}       # what `llmopt compress` adds
LAYERS = {"per_layer_config?": {str: {str: object}}, str: object}


def read_facts(folder: Path) -> dict[str, Any]:
    """The llmopt.json of a checkpoint; raises LlmoptError for one that is missing, damaged or of a newer llmopt."""
    file = folder / FILE
    if folder.is_dir() and not file.exists():
        raise LlmoptError(f"{folder}: no {FILE}; this is not a checkpoint written by llmopt")
    facts = read_json(file)
    newest = facts.get("format_version", 0)
    if isinstance(newest, int) and newest > FORMAT_VERSION:
        raise LlmoptError(f"{file}: format_version {newest} is of a newer llmopt; this one reads {FORMAT_VERSION}")
    check_shape(facts, FACTS, str(file))
    if len(facts.get("records", [])) > MAX_STEPS:
        raise LlmoptError(f"{file}: records of {len(facts['records']):,} steps; no run has more than {MAX_STEPS}")
    methods_of(facts, str(file))
    return facts


def methods_of(facts: dict[str, Any], where: str) -> list[Method | None]:
    """The method of every record, its fields and the shape of its meta checked; None for one that is not known here."""
    found: list[Method | None] = []
    for i, record in enumerate(facts.get("records", [])):
        with naming(f"{where}: records.{i}"):
            found.append(build(record["method"], record["fields"]) if record["method"] in names() else None)
            if found[-1]:
                found[-1].check_meta(record["meta"])
    return found


def check_runtime(folder: Path, facts: dict[str, Any], spec: ModelSpec) -> None:
    """Raise LlmoptError for the record of a run-time method that does not fit the model beside it, which `spec` names.

    A checkpoint is loaded by what its config.json says of such methods, which passes the same checks.
    """
    where = str(folder / FILE)
    acting = [(i, method) for i, method in enumerate(methods_of(facts, where)) if isinstance(method, RuntimeMethod)]
    if not any(facts["records"][i]["meta"] for i, _ in acting):
        return
    _, config = read_config(spec)
    with refusals(f"{folder}: the model cannot be loaded"):
        model = skeleton(config, torch.float32)
        for i, method in acting:
            with naming(f"{where}: records.{i}"):
                method.check_record(model, Record(facts["records"][i]["meta"]))


def read_layers(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, its per-layer shapes held against their form."""
    config = check_config(folder / "config.json")
    check_shape(config, LAYERS, str(folder / "config.json"))
    return config
