"""Head scores as they pass from step to step: checked, in JSON and safetensors files, found by name."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmopt.errors import LlmoptError, naming, nearest
from llmopt.files import tensors
from llmopt.files.checks import load_json
from llmopt.files.json_shapes import NUMBER
from llmopt.method import FILES, Method, Run
from llmopt.model.blocks import blocks
from llmopt.model.levels import refuse_below


def read_scores(file: Path, beside: str | None = None) -> list[list[float]]:
    """Head scores [L][H] from a file: JSON, {"scores": [L][H]} or the bare list; safetensors, "scores.LAYER" [H].

    Raises LlmoptError for anything else. beside: the name of another figure of each head that the file is to hold.
    """
    content = _by_name(file) if file.suffix == ".safetensors" else load_json(file)
    rows = content.get(beside or "scores") if isinstance(content, dict) else None if beside else content
    if rows is None and beside:
        raise LlmoptError(f"{file}: holds no {beside!r}; write it by `llmopt heads MODEL --method heads.replay "
                          "--output FILE`")
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_score, row)) for row in rows):
        raise LlmoptError(f'{file}: holds no head scores; expected {{"scores": [[...], ...]}} of finite numbers')
    return rows


def _by_name(file: Path) -> dict[str, list[Any]]:
    """{"scores": [L][H], ...} from the tensors "scores.0", "scores.1", ... of a file."""
    found: dict[str, list[Any]] = {}
    held = tensors.read(tensors.of_file(file))
    for name in sorted({key.rpartition(".")[0] for key in held}):
        layers = [f"{name}.{layer}" for layer in range(sum(key.rpartition(".")[0] == name for key in held))]
        if all(key in held and held[key].dim() == 1 for key in layers):
            found[name] = [held[key].tolist() for key in layers]
    return found


def _is_score(value: Any) -> bool:
    return isinstance(value, NUMBER) and abs(value) < 1e30


def check_scores(scores: list[Tensor], heads: list[int]) -> None:
    """Raise LlmoptError unless there is one finite number for each of the `heads` of every layer."""
    if [len(s) for s in scores] != heads:
        raise LlmoptError(f"scores for {[len(s) for s in scores]} heads per layer; the model has {heads}")
    for layer, values in enumerate(scores):
        if not bool(values.isfinite().all()):
            raise LlmoptError(f"layer {layer}: scores that are not finite: {values.tolist()}")


def check_chosen(chosen: list[list[int]], model: nn.Module, name: str) -> None:
    """Raise LlmoptError unless `chosen` lists heads of every layer, in order and each once; name: of the method."""
    views = blocks(model)
    if len(chosen) != len(views):
        raise LlmoptError(f"{name}: heads of {len(chosen)} layers; the model has {len(views)}")
    for view, heads in zip(views, chosen, strict=True):
        if heads != sorted(set(heads)) or any(not 0 <= head < view.heads for head in heads):
            raise LlmoptError(f"{name}: layer {view.index} has heads 0 to {view.heads - 1}, in order and each once; "
                              f"{heads} given")


def save_scores(path: str | Path, name: str, scores: list[Tensor], meta: dict[str, Any]) -> None:
    """Write the scores, and how they came about, to a file that `load_scores` reads.

    JSON: {"name", "scores": [L][H], ...}; .safetensors: "scores.LAYER" [H], so for all that is told of each head, the
    rest as JSON in the metadata.
    """
    data, target = {"name": name, **meta, "scores": [s.tolist() for s in scores]}, Path(path).expanduser()
    if target.suffix != ".safetensors":
        target.write_text(json.dumps(data, indent=1) + "\n")
        return
    told = {key: value for key, value in data.items() if _of_heads(value)}
    layers = {f"{key}.{layer}": torch.tensor(row, dtype=torch.float32)
              for key, rows in told.items() for layer, row in enumerate(rows)}
    save_file(layers, target, {"llmopt": json.dumps({key: data[key] for key in data if key not in told})})


def _of_heads(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def load_scores(path: str | Path, beside: str | None = None) -> list[Tensor]:
    """Scores from a file, as `read_scores` finds them."""
    return [torch.tensor(row, dtype=torch.float32) for row in read_scores(Path(path).expanduser(), beside)]


def find(name: str, run: Run, model: nn.Module, beside: str | None = None) -> list[Tensor]:
    """Head scores [H_l] of every layer by the name of their step, or from a file.

    Those of a file may be of the model before it was pruned in this run. beside:
    another figure of each head that the step tells of. Raises LlmoptError for scores of other heads.
    """
    told = name if beside is None else f"{name}.{beside}"
    rows = run.scores[told] if told in run.scores else _from_file(name, run, beside)
    given, present = [len(row) for row in rows], [block.heads for block in blocks(model)]
    if not all(bool(row.isfinite().all()) for row in rows):
        raise LlmoptError(f"heads: {name} holds scores that are not finite")
    if given == present:
        return rows
    if run.heads is not None and tuple(given) == run.heads.before:
        return run.heads.select(rows)
    raise LlmoptError(f"heads: {name} holds scores of other heads than this model has: {_counted(given)}; the model "
                      f"has {_counted(present)}")


def check_known(steps: Sequence[Method], run: Run, model: nn.Module) -> None:
    """Raise LlmoptError for head scores, of a file or of a step that has run, which a step to come cannot use.

    steps: all of the recipe. Behind the first one that prunes, which heads will be left is not known: none is asked.
    """
    for index, step in enumerate(steps):
        name = step.scored_by
        if name in run.scores or name and name.endswith(FILES):
            with naming(f"steps.{index} {step.name}"):
                refuse_below(model, step.level, step.name)
                step.check_scores(find(name, run, model), model)
        if step.stage == "prune":
            return


def _from_file(name: str, run: Run, beside: str | None) -> list[Tensor]:
    if name in run.scores:
        raise LlmoptError(f"heads: {name} does not tell {beside!r} of each head; heads.replay does")
    if not name.endswith(FILES):
        raise LlmoptError(f"heads: no score step {name!r}{nearest(name, run.scores) if run.scores else ' ran before'}")
    if not Path(name).expanduser().is_file():
        raise LlmoptError(f"heads: there is no file {name}")
    return load_scores(name, beside)


def _counted(heads: list[int]) -> str:
    """"3 layers of 4 heads", or the number of heads of each layer."""
    alike = f"{len(heads)} layers of {heads[0]} heads" if heads and len(set(heads)) == 1 else None
    return alike or f"{heads} heads by layer"


def water_fill(weights: Tensor, cap: float) -> Tensor:      # [N] -> [N]
    """Shares with sum N, by weight, none above `cap` >= 1; all alike where nothing has weight."""
    shares, free = torch.zeros_like(weights), torch.ones_like(weights, dtype=torch.bool)
    left = float(len(weights))
    while left > 1e-9 and bool(free.any()):
        by = weights * free if float(weights[free].sum()) > 0 else free.to(weights)
        given = left * by / by.sum()
        over = free & (given > cap)
        if not bool(over.any()):
            return shares + given
        shares[over], free = cap, free & ~over
        left = len(weights) - float(shares.sum())
    return shares
