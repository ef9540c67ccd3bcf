"""llmopt.json, what a checkpoint says about itself: read, and held against its shape before anybody trusts it."""
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import check_config, read_json
from llmopt.files.json_shapes import COUNT, NUMBER, SIZE, check_shape, finite

FORMAT_VERSION, MAX_STEPS = 1, 50
FILE = "llmopt.json"
# A shape is a type, a range of integers, `finite`, [each item], (item, item), or {key: value}: `?` after a key that may
# be missing, `str` for the keys that are not named.
META = {"modules?": {str: {"bits": finite, str: object}}, "shares?": [[finite]], "bits?": finite, str: object}
FACTS = {
    "format_version": COUNT, "versions": {"llmopt": str, str: str}, "base_model": str, "base_repo?": str | None,
    "base_licence": str | None,
    "format": str, "bytes": SIZE, "loads_with": {"transformers": str, str: str}, "changes?": [str],
    "calibration?": {"samples?": COUNT, "tokens?": COUNT},
    "records?": [{"method": str, "fields": {str: object}, "meta": META}], "table?": [(str, str, str)],
    "scores?": {str: [(str, str, NUMBER)]}, "errors?": {str: [(str, str, NUMBER)]}, str: object,
}
RUN = {"parameters": (COUNT, COUNT), "dense_bytes": SIZE, "predicted_bytes": int | None,
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
    return facts


def read_layers(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, its per-layer shapes held against their form."""
    config = check_config(folder / "config.json")
    check_shape(config, LAYERS, str(folder / "config.json"))
    return config
