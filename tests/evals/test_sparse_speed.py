"""`llmopt bench attention`: what is timed is what is computed, and recall is that of the softmax."""
import json

import pytest
import torch
from llmopt_evals.bench import attention, recall

from llmopt import runtime
from llmopt.attention import AShape, BlockTopK
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.runtime.attention_rows import attention_rows
from tests import tiny
from tests.command import call


def test_rows_tell_what_was_computed(monkeypatch):
    monkeypatch.setattr(attention.time, "thread_time", iter(range(0, 10_000, 2)).__next__)       # each call: 2 seconds
    plan = attention.Plan(lengths=(64,), dims=(8,), rounds=1)
    threads = torch.get_num_threads()
    row, = attention.measure(plan, [AShape(sinks=4, window=16)], lambda settings, name: settings)
    assert row["density"] == pytest.approx((20 * 21 / 2 + 44 * 20) / (64 * 65 / 2))
    assert (row["dense"], row["selection"], row["attention"], row["faster"]) == (2, 2, 2, 0.5)
    assert torch.get_num_threads() == threads


def test_recall_is_the_share_of_the_softmax(monkeypatch):
    model, ids = tiny.make("llama"), tiny.ids(1, 40)[0]
    methods = [AShape(sinks=3, window=7), BlockTopK(block=4, keep=99), AShape(sinks=3, window=7, min_length=9999)]
    found = recall.measure(model, [ids], methods, Run())
    kept, i, j = [], torch.arange(40)[:, None], torch.arange(40)
    seen = (j < 3) | (i - j < 7)
    with torch.no_grad(), attention_rows(model, lambda rows: kept.append((rows.weights * seen).sum(-1).mean())):
        model(ids[None])
    assert found[0]["recall"] == found[2]["recall"] == pytest.approx(float(torch.stack(kept).mean()), abs=1e-5)
    assert found[1]["recall"] == pytest.approx(1, abs=1e-5) and found[1]["density"] == 1
    assert not runtime.runtime_config(model)["steps"]                            # it was taken off again


@pytest.mark.parametrize(("words", "says"), [
    (["quant.rtn"], "a selector of sparse prefill expected"), (["attention.act"], "a selector of sparse prefill"),
    (["attention.ancor"], "did you mean 'attention.anchor'?"), (["--lengths", "0"], "--lengths: '0' given"),
    (["attention.local_heads"], "decides beforehand by a model")])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    assert call(monkeypatch, "bench", "attention", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


def test_the_tables(monkeypatch, capfd):
    monkeypatch.setattr(attention, "QUICK", attention.Plan(lengths=(64,), dims=(8,), rounds=1))
    assert call(monkeypatch, "bench", "attention", "attention.a_shape: {window: 16}", "--quick") == 0
    assert "window: 16" in capfd.readouterr().out
    words = ["attention.anchor: {block: 8, step: 2}", "attention.local_heads: {window: 8}", "--part", "recall"]
    assert call(monkeypatch, "bench", "attention", *words, "--length", "64", "--rows", "1", "--json") == 0
    anchor, local = json.loads(capfd.readouterr().out)
    assert 0.3 < anchor["density"] < 1 and anchor["recall"] > 0.8 and local["density"] < 1


def test_nothing_is_selected_without_a_model():
    with pytest.raises(LlmoptError, match="there is none here"):
        attention.measure(attention.QUICK, recall.selectors(["attention.local_heads"]), lambda settings, name: settings)
