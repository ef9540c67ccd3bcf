"""`llmopt bench kv`, second part: scorers take their share of a real prefill, and compression includes the scores."""
import time

import pytest
import torch
from llmopt_evals.bench import scoring

from llmopt.cli import measured
from llmopt.kv.base import Scorer
from llmopt.runtime.attach import attachment
from tests.tiny import make

PLAN = scoring.Plan(lengths=(64,), blocks=1, rounds=1)


def test_every_scorer_has_a_row(monkeypatch):
    monkeypatch.setattr(scoring, "AutoModelForCausalLM", Small)
    threads, real = torch.get_num_threads(), Scorer.compress
    rows = scoring.measure(PLAN, lambda settings, name: settings)
    assert [row["method"] for row in rows] == scoring.scorers() and len(rows) > 15
    assert all(0 < row["scores"] <= row["compression"] for row in rows if row["method"] != "kv.streaming")
    assert (torch.get_num_threads(), Scorer.compress) == (threads, real)


class Small:
    """Stands in for transformers' class of that name: the tiny model."""

    @staticmethod
    def from_config(*args, **kwargs):
        return make("llama")


def test_shares_are_of_the_forward_without_the_compression(monkeypatch):
    """A clock that gives every call one second more: scores and compression are known parts of the whole."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(Scorer, "compress", lambda self, *args: self.scores_of(*args))
    monkeypatch.setattr(Scorer, "scores_of", lambda self, *args: None)
    model = make("llama")
    found = scoring.shares(model, "kv.knorm", 64, PLAN)
    # each of 3 layers: compress takes 3 ticks, scores 1 of them; the forward takes 13, of them 4 outside
    assert found == pytest.approx((3 / 4, 9 / 4))
    assert attachment(model) is None


def test_the_table_has_a_row_for_each_method_and_columns_for_each_length(capsys):
    rows = [{"method": "kv.knorm", "length": length, "scores": 0.01, "compression": 0.025} for length in (64, 128)]
    measured.show_speeds([], rows, False)
    out = capsys.readouterr().out
    assert "share of a prefill" in out and out.count("kv.knorm") == 1 and out.count("2.5%") == 2
