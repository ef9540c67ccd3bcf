"""Rank correlations by hand, and what masking heads costs."""
import json

import pytest
import torch
from llmopt_evals.ablate import Asked, costs, heads_of, sets, usual_tasks
from llmopt_evals.world import tasks_path
from tqdm import tqdm

import llmopt
from llmopt.errors import LlmoptError
from llmopt.heads import Retrieval, load_scores, save_scores
from llmopt.heads.compare import rank_correlation, ranks
from llmopt.method import Run
from tests import tiny
from tests.command import call


def test_ranks_and_their_correlation_by_hand():
    assert ranks(torch.tensor([3., 1., 3., 7.])).tolist() == [1.5, 0, 1.5, 3]
    one, other = [torch.tensor([1., 2.]), torch.tensor([3., 4.])], [torch.tensor([10., 30.]), torch.tensor([20., 40.])]
    assert rank_correlation(one, other) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation(one, [-row for row in one]) == pytest.approx(-1)
    assert rank_correlation(one, [torch.ones(2), torch.ones(2)]) is None
    with pytest.raises(LlmoptError, match="different heads"):
        rank_correlation(one, [torch.ones(4)])


def test_random_heads_lie_outside_the_top():
    scores = [torch.tensor([5., 1., 2.]), torch.tensor([4., 3., 0.])]
    (_, top), (_, bottom), *drawn = sets(scores, 2, 30, 0)
    assert top == [(0, 0), (1, 0)] and bottom == [(0, 1), (1, 2)]
    assert all(kind == "random" and len({*heads}) == 2 and not {*heads} & {*top} for kind, heads in drawn)
    assert {head for _, heads in drawn for head in heads} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    assert [heads_of(wanted, scores) for wanted in (0.1, 0.4, 3.0)] == [1, 2, 3]


def test_without_the_heads_that_retrieve_the_reference_model_forgets_what_it_read(monkeypatch):
    shown, start = [], tqdm.__init__

    def begin(self, *args, **kwargs):
        shown.append(not kwargs.get("disable"))
        start(self, *args, **kwargs)

    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    run = Run(tokenizer=tokenizer)
    Retrieval(probe="world", probes=12, length=200).apply(model, run)
    asked = Asked(("world_recall_40_agnostic",), limit=8, draws=3)
    monkeypatch.setattr(tqdm, "__init__", begin)
    found = costs(model, tokenizer, run.scores, 5, "uniform", asked)["heads.retrieval"]
    dense, top, bottom, drawn = (column["world_recall_40_agnostic", "acc"] for column in found.values())
    assert [*found] == ["nothing masked", "top 5", "bottom 5", "random 5"]
    assert dense[0] == 1 and top[0] < .4 and bottom[0] > .7 and drawn[0] > top[0] + .3
    assert drawn[1] <= drawn[0] <= drawn[2]
    assert usual_tasks(tokenizer, None) == ["world_recall", "world_ppl"]
    assert 0 < sum(shown) <= len(shown) / 6 and tqdm.__init__ is begin           # lm-eval's, of the first of six


def test_the_command_correlates_scores_and_files(tmp_path, monkeypatch, capfd):
    words = ("heads", "llmopt/reference", "--samples", "2", "--length", "64", "--data", "world")
    assert call(monkeypatch, "-q", *words, "--output", tmp_path / "s.safetensors") == 0
    capfd.readouterr()
    assert call(monkeypatch, "-q", *words, "--method", "heads.need90", "--method", tmp_path / "s.safetensors", "--json",
                "--correlate") == 0
    found = json.loads(capfd.readouterr().out)
    assert [*found] == [str(tmp_path / "s.safetensors"), "heads.need90"] and \
        found["heads.need90"]["heads.need90"] == pytest.approx(1)
    assert all(abs(value) <= 1 for row in found.values() for value in row.values())


def test_scores_travel_through_safetensors(tmp_path):
    kept, file = [torch.tensor([0.1, 2.0]), torch.tensor([]), torch.tensor([1.0])], tmp_path / "s.safetensors"
    save_scores(file, "heads.x", kept, {"samples": 3, "at_5": [[1., 2.], [], [3.]]})
    assert all(torch.equal(a, b) for a, b in zip(kept, load_scores(file), strict=True))
    assert [s.tolist() for s in load_scores(file, "at_5")] == [[1, 2], [], [3]]
    with pytest.raises(LlmoptError, match="holds no 'at_9'"):
        load_scores(file, "at_9")
    method = llmopt.kv.SnapKV(ratio=0.5, allocate="heads", heads=str(tmp_path / "t.safetensors"))
    assert method.reads == (str(tmp_path / "t.safetensors"),)
    save_scores(tmp_path / "t.safetensors", "heads.x", [torch.rand(4) for _ in range(3)], {})
    assert len(method.apply(tiny.make("llama"), Run()).meta["shares"]) == 3
    llmopt.files.shards.save({"other": torch.ones(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(LlmoptError, match="holds no head scores"):
        load_scores(tmp_path / "bad.safetensors")


def test_tasks_of_a_file_run_their_code_only_with_leave(tmp_path, monkeypatch, capfd):
    own = (tasks_path() / "world_copy.yaml").read_text().replace("task: world_copy", "task: mine")
    (tmp_path / "mine.yaml").write_text(own.replace("!function utils.", "!function mine."))
    (tmp_path / "mine.py").write_text("from llmopt_evals.tasks.utils import *")
    save_scores(tmp_path / "s.json", "heads.x", [torch.arange(8.) + 8 * layer for layer in range(6)], {})
    words = ("-q", "heads", "llmopt/reference", "--method", tmp_path / "s.json", "--samples", 1, "--ablate", 1,
             "--draws", 0, "--limit", 1, "--json", "--tasks", tmp_path / "mine.yaml")
    assert call(monkeypatch, *words) == 2
    assert "give --trust-remote-code on the command line" in capfd.readouterr().err
    assert call(monkeypatch, *words, "--trust-remote-code") == 0
    assert "mine" in capfd.readouterr().out
