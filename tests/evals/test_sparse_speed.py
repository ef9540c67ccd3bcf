"""`llmopt bench attention`: what is timed is what is computed, and recall is that of the softmax."""
import json

import pytest
import torch
from llmopt_evals.bench import answers, attention, flex, recall
from llmopt_kernels import Rule

from llmopt import runtime
from llmopt.attention import AShape, BlockTopK
from llmopt.attention.base import State
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.runtime.attention_rows import attention_rows
from tests import tiny
from tests.command import call
from tests.kernels.test_sparse import visible_by_hand


def test_rows_tell_what_was_computed(monkeypatch):
    monkeypatch.setattr(attention.time, "thread_time", iter(range(0, 10_000, 2)).__next__)       # each call: 2 seconds
    plan = attention.Plan(lengths=(64,), dims=(8,), rounds=1)
    threads = torch.get_num_threads()
    row, = attention.measure(plan, [AShape(sinks=4, window=16)], lambda settings, name: settings)
    assert row["density"] == pytest.approx((20 * 21 / 2 + 44 * 20) / (64 * 65 / 2))
    assert (row["dense"], row["selection"], row["attention"], row["faster"], row["used"]) == (2, 2, 2, 0.5, 1)
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
    (["attention.local_heads"], "decides beforehand by a model"),
    (["attention.stem: {heads: heads.span}"], "decides beforehand by a model"),
    (["--part", "recall", "--plot", "a.gif"], "a plot is a .png")])
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


def test_answers_are_counted_as_generated(monkeypatch):
    """Of a prompt that holds its questions, and of questions in turns of their own."""
    model, tokens = tiny.make("llama"), tiny.ids(1, 40)[0].tolist()
    first = model(torch.tensor([tokens])).logits[0].argmax(-1)
    inside = answers.Text([*tokens[:21], int(first[20]), *tokens[22:]], [21, 30], [])
    greedy = model.generate(torch.tensor([[*tokens, 5, 6]]), max_new_tokens=2, do_sample=False)[0, -2:].tolist()
    behind = answers.Text(tokens, [], [answers.Question([5, 6], greedy), answers.Question([5, 6], greedy[::-1])])
    found = answers.measure(model, [inside, behind], [AShape(sinks=0, window=99, min_length=0), AShape(
        sinks=1, window=2, min_length=0)], Run())
    assert greedy[0] != greedy[1]
    assert [(row["exact"], row["asked"], row["density"]) for row in found[:2]] == [(2, 4, 1.0)] * 2
    assert found[2]["density"] == pytest.approx((2 * (3 + 38 * 3) + 2 * 2 * 3) / (2 * 820 + 2 * (41 + 42)), rel=0.01)
    assert not runtime.runtime_config(model)["steps"]


def test_documents_of_the_world_hold_their_questions():
    one, other = answers.of_world(256, 2)
    assert len(one.ids) == len(other.ids) == 256 and one.places and other.places
    assert min(one.places) < 128 < min(other.places)
    for text in (one, other):
        for place in text.places:                           # `tell key has VALUE`: the statement stands before
            key, value = text.ids[place - 2], text.ids[place]
            assert any(text.ids[i] == key and text.ids[i + 2] == value for i in range(place - 4))


def test_answers_on_the_command_line(monkeypatch, capfd, tmp_path):
    words = ["attention.a_shape: {window: 20, min_length: 0}", "attention.a_shape: {window: 60, min_length: 0}",
             "attention.a_shape: {sinks: 1, density: 0.5, rows: 1, min_length: 0}"]          # searched for once
    more = ["--part", "answers", "--length", "128", "--rows", "1", "--plot", str(tmp_path / "a.svg")]
    assert call(monkeypatch, "bench", "attention", *words, *more) == 0
    told = capfd.readouterr().out
    assert "window: 60" in told and "dense" in told and "100.0%" in told and "density: 0.5" in told
    assert "right answers" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("together", [False, True])
def test_flex_attention_gets_the_same_pairs(together):
    q, k, v = attention.drawn(96, 16, torch.float32)
    state = State(0, Rule(0.25), v, 0, 0)
    stripes = BlockTopK(block=16, keep=1, together=together, near=2).select(q, k, state)
    seen = visible_by_hand(stripes, state.rule, 8, 96, 96)[1]
    blocks = flex.blocks_of(stripes, 8, 96).to_dense()[0].bool()
    assert torch.equal(blocks.repeat_interleave(16, 1).repeat_interleave(16, 2) & torch.ones(96, 96).tril().bool(),
                       seen) and not seen.all()
    assert flex.on(AShape().select(q, k, state), q, k, v) is None


def test_without_a_compiler_flex_attention_is_one_line(monkeypatch, capfd):
    def broken(*given, **more):
        raise OSError("no g++\nand much more")

    monkeypatch.setattr(torch, "compile", lambda work: broken)
    monkeypatch.setattr(attention, "QUICK", attention.Plan(lengths=(64,), dims=(8,), rounds=1, flex=True))
    assert call(monkeypatch, "bench", "attention", "attention.block_topk: {block: 16}", "--quick") == 2
    assert "flex_attention: " in capfd.readouterr().err


def test_nothing_is_selected_without_a_model():
    with pytest.raises(LlmoptError, match="there is none here"):
        attention.measure(attention.QUICK, recall.selectors(["attention.local_heads"]), lambda settings, name: settings)
