"""Scores of dense models, kept by fingerprint: a model that has not changed is measured once.

A score is found again under the hash of all that it depends on: the bytes of the model's files, the types, the device,
the task with its versions and options, the text, the number of documents, and FIGURES. The folder is
$LLMOPT_CACHE/scores, else $XDG_CACHE_HOME/llmopt/scores, else ~/.cache/llmopt/scores; scores of llmopt/reference are
shipped beside it (`python -m llmopt_evals.kept` measures them). What a file holds is believed only if it carries the
whole key and figures alone; a damaged one is measured over. The data of a hub task count by the task's version.
"""
import hashlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmopt.checkpoint.facts import FILE
from llmopt.errors import LlmoptError
from llmopt.files import cache
from llmopt.files.checks import load_json
from llmopt.files.hub import fetch
from llmopt.files.json_shapes import check_shape
from llmopt.files.shards import write_text
from llmopt.model.computing import fast_type
from llmopt.model.loading import read_config, resolve
from llmopt.model.ways import view
from llmopt.scale.processes import Ranks
from llmopt.specs import ModelSpec
from llmopt_evals import FIGURES, texts
from llmopt_evals import evaluate as runs
from llmopt_evals.asking import Asking
from llmopt_evals.preflight import tokenizer_of

SHIPPED = Path(__file__).parent / "world" / "scores"
OURS = ("world", "text_ppl", "needles")                 # tasks that no version of lm-eval changes
NOT_READ = ("llmopt.json", "training.json", view.FILE)             # files of a model's folder that no score depends on
SUFFIXES = (".safetensors", ".gguf", ".json", ".py", ".model", ".jinja", ".txt")
PARTS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
LARGEST = 4 << 20       # bytes of a file of scores
SHAPE = {"key": dict, "date": str, "part": {"results": {str: {str: object}}, str: object}}


def scores(spec: ModelSpec, tasks: list[str], limit: int | None, batch_size: int, text: str | None,
           ranks: Ranks, anew: bool = False,
           asking: Asking = Asking()) -> tuple[dict[str, Any] | None, dict[str, str]]:      # noqa: B008  frozen
    """(lm-eval's results, {task: date} of those that were kept) of a model; rank 0 alone gets results.

    anew: measure all, and keep what comes of it. asking: see `evaluate`; where questions and answers are wanted, all is
    measured. A checkpoint that llmopt has written is measured every time, and tasks of files whose code may change.
    """
    files = Path(resolve(spec)) if Path(resolve(spec)).is_dir() else fetch(spec.id, spec.revision)
    if (files / FILE).is_file() or asking.include_path or runs.task_files(tasks):
        return runs.evaluate(spec, tasks, None, limit, batch_size, text, ranks, None, asking), {}
    keys = keys_of(spec, files, tasks, limit, text, asking)
    anew = anew or asking.log_samples
    found = ranks.agree({} if anew else {task: kept for task, one in keys.items() if (kept := read(one))})
    missing = [task for task in tasks if task not in found]
    measured = runs.evaluate(spec, missing, None, limit, batch_size, text, ranks, None, asking) if missing else {}
    if not ranks.is_main:
        return None, {}
    parts = {task: found[task]["part"] if task in found else part_of(measured, task) for task in tasks}
    for task in missing:
        write(keys[task], parts[task])
    samples = {"samples": measured["samples"]} if asking.log_samples else {}
    return merged(list(parts.values())) | samples, {task: kept["date"] for task, kept in found.items()}


def keys_of(spec: ModelSpec, files: Path, tasks: list[str], limit: int | None, text: str | None,
            asking: Asking = Asking()) -> dict[str, dict[str, Any]]:      # noqa: B008  frozen
    """{task: all that its score depends on}; files: the model's folder."""
    _, config = read_config(spec)
    metadata = runs.asked_by(config, tokenizer_of(spec), text)
    stored = spec.dtype or str(config.dtype or "float32").removeprefix("torch.")
    computed = spec.compute_dtype if spec.compute_dtype != "auto" else _fast(stored, spec.device)
    model = {"figures": FIGURES, "limit": limit, "dtype": stored, "computed": computed,
             "device": spec.device.partition(":")[0],
             "files": {file.name: _digest(file) for file in sorted({*files.iterdir(), *view.files(files)})
                       if file.suffix in SUFFIXES and file.name not in NOT_READ and not file.name.startswith("eval-")}}
    model |= {"asked": asked} if (asked := asking.changed()) else {}        # older keys stay what they are
    manager = runs.prepared(tasks, spec.trust_remote_code, metadata)
    return {task: model | {"task": task, "versions": runs.versions(manager, [task]),
                           "lm_eval": None if task.startswith(OURS) else version("lm_eval"),
                           "text": _digest_of(text, task)} for task in tasks}


def _fast(stored: str, device: str) -> str:
    import torch

    return str(fast_type(getattr(torch, stored), device)).removeprefix("torch.")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(text: str | None, task: str) -> str | None:
    """Of the file that a task reads, which may be named by LLMOPT_TEXT; none for tasks of the world."""
    named = None if task.startswith("world") else text or os.environ.get(texts.VARIABLE)
    return _digest(Path(named).expanduser()) if named else None


def folder() -> Path:
    """Where this user's scores are kept; raises RuntimeError for a user without a home."""
    return cache.folder("scores")


def read(wanted: dict[str, Any]) -> dict[str, Any] | None:
    """{"date", "part"} of the score with this key; None where there is none that can be believed."""
    for place in (folder, lambda: SHIPPED):
        try:
            file = place() / _file(wanted)
            if file.is_file() and file.stat().st_size <= LARGEST:
                content = load_json(file)
                check_shape(content, SHAPE, str(file))
                if content["key"] == wanted and _are_figures(content["part"]["results"]):
                    return content
        except (LlmoptError, OSError, RuntimeError):            # damaged, foreign, not to be read: measured over
            continue
    return None


def write(known: dict[str, Any], part: dict[str, Any], place: Path | None = None) -> None:
    """Keep a part of lm-eval's results; where nothing can be written, nothing is kept."""
    try:
        place = place or folder()
        place.mkdir(parents=True, exist_ok=True)
        content = {"key": known, "date": time.strftime("%Y-%m-%d"), "part": part}
        write_text(place / _file(known), json.dumps(content, indent=1) + "\n")
    except (OSError, RuntimeError):
        return


def _file(known: dict[str, Any]) -> str:
    return cache.name_of(known)


def _are_figures(results: dict[str, dict[str, Any]]) -> bool:
    return all(isinstance(value, (int, float, str)) for values in results.values() for name, value in values.items()
               if "," in name)                  # metric,filter; other entries are no figures


def part_of(results: dict[str, Any], task: str) -> dict[str, Any]:
    """What lm-eval's results say of one task and, if it is a group, of those below it: plain JSON."""
    from lm_eval.utils import handle_non_serializable

    names, below = [task], results.get("group_subtasks", {})
    for name in names:
        names += [member for member in below.get(name, []) if member not in names]
    part = {kind: {name: value for name, value in results[kind].items() if name in names}
            for kind in PARTS if isinstance(results.get(kind), dict)}
    return json.loads(json.dumps(part, default=handle_non_serializable))


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of several tasks in one."""
    return {"config": {}} | {kind: {name: value for part in parts for name, value in part.get(kind, {}).items()}
                             for kind in PARTS}


def ship() -> None:
    """Measure and write what is shipped: llmopt/reference on the tasks of the world, in both types that CPUs take."""
    from llmopt_evals.world import reference_path

    tasks = ["world_ppl", "world_facts", "world_copy", "world_recall"]
    for computed in ("float32", "bfloat16"):
        spec = ModelSpec(compute_dtype=computed)
        results = runs.evaluate(spec, tasks)
        for task, key in keys_of(spec, reference_path(), tasks, None, None).items():
            write(key, part_of(results, task), SHIPPED)


if __name__ == "__main__":
    ship()
