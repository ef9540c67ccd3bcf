"""Head scores as they pass from step to step: checked, in JSON files, found by name."""
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import LlmoptError, nearest
from llmopt.files.checks import load_json
from llmopt.files.json_shapes import NUMBER
from llmopt.method import Run


def read_scores(file: Path) -> list[list[float]]:
    """Head scores [L][H] from a JSON file, {"scores": [L][H]} or the bare list; LlmoptError for anything else."""
    content = load_json(file)
    rows = content.get("scores") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_score, row)) for row in rows):
        raise LlmoptError(f'{file}: holds no head scores; expected {{"scores": [[...], ...]}} of finite numbers')
    return rows


def _is_score(value: Any) -> bool:
    return isinstance(value, NUMBER) and abs(value) < 1e30


def check_scores(scores: list[Tensor], heads: list[int]) -> None:
    """Raise LlmoptError unless there is one finite number for each of the `heads` of every layer."""
    if [len(s) for s in scores] != heads:
        raise LlmoptError(f"scores for {[len(s) for s in scores]} heads per layer; the model has {heads}")
    for layer, values in enumerate(scores):
        if not bool(values.isfinite().all()):
            raise LlmoptError(f"layer {layer}: scores that are not finite: {values.tolist()}")


def save_scores(path: str | Path, name: str, scores: list[Tensor], meta: dict[str, Any]) -> None:
    """Write the scores, and how they came about, as JSON: {"name", "scores": [L][H], ...}."""
    data = {"name": name, **meta, "scores": [s.tolist() for s in scores]}
    Path(path).expanduser().write_text(json.dumps(data, indent=1) + "\n")


def load_scores(path: str | Path) -> list[Tensor]:
    """Scores from a JSON file: {"scores": [L][H]} or the bare list; raises LlmoptError for anything else."""
    return [torch.tensor(row, dtype=torch.float32) for row in read_scores(Path(path).expanduser())]


def find_scores(name: str, run: Run) -> list[list[float]]:
    """Head scores by the name of their step, or from a .json file: {"scores": [L][H]} or the bare list."""
    if name in run.scores:
        return [scores.tolist() for scores in run.scores[name]]
    if not name.endswith(".json"):
        raise LlmoptError(f"heads: no score step {name!r}{nearest(name, run.scores) if run.scores else ' ran before'}")
    file = Path(name).expanduser()
    if not file.is_file():
        raise LlmoptError(f"heads: there is no file {name}")
    return read_scores(file)
