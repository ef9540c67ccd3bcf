"""Models larger than memory are scored with their weights on disk: the same figures, and nothing is left there."""
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from llmopt_evals import large
from llmopt_evals.evaluate import evaluate, figures
from llmopt_evals.world import reference_path

from llmopt import recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_tokenizer
from llmopt.run import pipeline
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call

TASKS = ["world_ppl", "world_recall_40_agnostic"]
ROOM = 1_000_000        # bytes: half of the reference model
STEPS = {
    "packed": "[quant.rtn: {bits: 3, group_size: 32, overrides: {down_proj: {bits: 8}}}, kv.snapkv: {ratio: 0.5}]",
    "zeros": "[quant.rtn: {scheme: W4A16_ASYM, group_size: 32}]",
    "nvfp4": "[quant.rtn: {scheme: NVFP4A16}]",
    "pruned": "[prune.magnitude: {ratio: 0.2, scope: global, refit: false}, quant.rtn: {bits: 4, group_size: -1}]",
}


def made(kind: str, folder: Path) -> Path:
    """The reference model, a checkpoint made of it, or a model with experts that speaks its language."""
    if kind == "dense":
        return reference_path()
    if kind == "experts":
        words = load_tokenizer(str(reference_path()))
        return checkpoint.save(tiny.make("mixtral", vocab_size=len(words), num_hidden_layers=6), folder / "out", words)
    pipeline.run(recipe.parse(f"steps: {STEPS[kind]}", "t"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("kind", ["dense", "experts", *STEPS])
def test_the_figures_are_those_of_a_model_in_memory(kind, tmp_path, monkeypatch):
    model, found, load = ModelSpec(id=str(made(kind, tmp_path))), [], large.load_model

    def watched(spec, **placement):
        found.append(load(spec, **placement))
        return found[-1]

    monkeypatch.setattr(large, "load_model", watched)
    expected = figures(evaluate(model, TASKS, limit=3))
    monkeypatch.setattr(large, "available", lambda: ROOM)
    assert figures(evaluate(model, TASKS, limit=3)) == expected
    first, second = ([p.is_meta for p in found[i][0].parameters()] for i in (0, 1))
    assert not any(first) and sum(second) > len(second) - 3
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    out = tmp_path / "out"
    with large.scratch(out) as mine, large.scratch(out) as second:
        left = mine.with_name(mine.name.replace(f"@{os.getpid()}-", f"@{psutil.pids()[-1] + 10**6}-"))
        (left / "dense").mkdir(parents=True)
        with large.scratch(out):
            assert mine.is_dir() and second.is_dir() and not left.exists()
    assert not list(tmp_path.glob(".*"))


def test_weights_that_another_tool_packed_are_refused(tmp_path, monkeypatch):
    folder = made("packed", tmp_path)
    (folder / "llmopt.json").unlink()
    monkeypatch.setattr(large, "available", lambda: ROOM)
    with pytest.raises(LlmoptError, match="out: does not fit into memory, and its weights, quantized by another tool"):
        evaluate(ModelSpec(id=str(folder)), TASKS, limit=1)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_scored_is_said_before_the_work(tmp_path, monkeypatch, capfd):
    (tmp_path / "r.yaml").write_text(f"steps: {STEPS['packed']}\neval: {{tasks: [world_ppl]}}\n")
    monkeypatch.setattr(large, "available", lambda: ROOM)
    monkeypatch.setattr(large, "psutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=ROOM)))
    output = tmp_path / "out"
    assert call(monkeypatch, "compress", "--recipe", str(tmp_path / "r.yaml"), "--output", str(output)) == 0
    line, = [line for line in capfd.readouterr().err.splitlines() if line.startswith("not scored")]
    assert line.startswith(f"not scored: {output}: takes 0.0 GB to score;")
    assert line.endswith(f"Later: llmopt eval {output} --tasks world_ppl --compare llmopt/reference")
    assert (output / "config.json").is_file() and not (output / "eval-before.json").exists()


def test_rounded_inputs_are_scored_in_memory_alone(tmp_path, monkeypatch):
    pipeline.run(recipe.parse("steps: [quant.rtn: {scheme: FP8_DYNAMIC}]", "t"), tmp_path / "out")
    monkeypatch.setattr(large, "available", lambda: ROOM)
    with pytest.raises(LlmoptError, match="what its weights read can be rounded only there"):
        evaluate(ModelSpec(id=str(tmp_path / "out")), TASKS, limit=3)
