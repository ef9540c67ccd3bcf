"""Scores of dense models are measured once for the same files, tasks, text and types, and again for any others."""
import json
import shutil

import pytest
import torch
from llmopt_evals import evaluate as runs
from llmopt_evals import kept
from llmopt_evals.world.tokenizer import save_tokenizer
from safetensors.torch import load_file, save_file

from llmopt.scale.processes import Ranks
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call

TASKS = ["world_copy", "world_recall"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny model of the world's words, and a cache folder of its own."""
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    tiny.make("llama", vocab_size=512, max_position_embeddings=64).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    return ModelSpec(id=str(tmp_path / "m"))


@pytest.fixture
def measured(monkeypatch):
    """The tasks of each evaluation that was really done."""
    done, real = [], runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda spec, tasks, *more: done.append(tasks) or real(spec, tasks, *more))
    return done


def scores(model, tasks=TASKS, limit=1, **more):
    results, dates = kept.scores(model, tasks, limit, 16, None, Ranks(), **more)
    return runs.figures(results), set(dates)


def test_a_model_is_measured_once_and_a_changed_one_again(model, measured, tmp_path):
    first, told = scores(model)
    assert told == set()
    assert scores(model) == (first, set(TASKS))
    assert scores(model, ["world_recall"])[1] == {"world_recall"}
    assert measured == [TASKS]
    scores(model, ["world_copy", "world_facts"])
    scores(model, ["world_copy"], limit=2)
    scores(model, ["world_copy"], anew=True)
    assert measured[1:] == [["world_facts"], ["world_copy"], ["world_copy"]]
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(64)}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert scores(model, ["world_copy"])[1] == set()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "other figures", "other key", "not to be read"])
def test_what_cannot_be_believed_is_measured_over(model, measured, tmp_path, damage):
    first, _ = scores(model, ["world_copy"])
    file, = (tmp_path / "cache" / "scores").iterdir()
    content = json.loads(file.read_text())
    if damage == "other figures":
        content["part"]["results"]["world_copy"]["acc,none"] = {"no": "figure"}
    elif damage == "other key":
        content["key"]["limit"] = 7
    elif damage == "not to be read":
        file.unlink()
        file.mkdir()
    if not file.is_dir():
        file.write_text(json.dumps(content) if damage.startswith("other") else damage)
    assert scores(model, ["world_copy"]) == (first, set())
    if file.is_dir():
        shutil.rmtree(file)


def test_without_a_place_to_write_nothing_is_kept(model, measured, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", "/proc/nowhere")
    assert [scores(model, ["world_copy"])[1] for _ in range(2)] == [set(), set()]


def test_the_command_tells_what_was_not_measured_now(model, measured, monkeypatch, capfd):
    words = ("eval", model.id, "--tasks", "world_copy", "--limit", "1")
    assert call(monkeypatch, *words) == 0
    assert "kept from" not in capfd.readouterr().out
    assert call(monkeypatch, *words) == 0
    assert "world_copy kept from 2" in capfd.readouterr().out
    assert call(monkeypatch, *words, "--json") == 0
    assert list(json.loads(capfd.readouterr().out)["kept"]) == [model.id]
    assert len(measured) == 1


@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_the_scores_of_the_reference_model_are_shipped(computed):
    tasks = ["world_ppl", "world_facts", "world_copy", "world_recall"]
    spec = ModelSpec(compute_dtype=computed)
    from llmopt_evals.world import reference_path

    for key in kept.keys_of(spec, reference_path(), tasks, None, None).values():
        assert kept.read(key), "run python -m llmopt_evals.kept"
