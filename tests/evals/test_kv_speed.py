"""`llmopt bench kv` measures real steps: each cache holds what it says, and a watch takes attention apart."""
import json
from dataclasses import replace

import pytest
import torch
from llmopt_evals.bench import kv, scoring
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmopt.runtime.attach import attachment
from tests.command import call
from tests.tiny import make

PLAN = replace(kv.QUICK, tokens=2, rounds=1)


def test_caches_hold_what_their_names_say():
    model = make("llama", num_key_value_heads=2)
    prompt = kv.noise(model, 200)
    parts = kv.kinds(2, len(prompt))
    stock, every, even, uneven, packed = (kv._filled(model, made, prompt) for made in parts.values())
    assert [layer.get_seq_length() for layer in stock.layers] == [200] * 3
    assert [layer.tolist() for layer in every.kept()] == [[[200, 200]]] * 3
    assert [layer.tolist() for layer in even.kept()] == [[[50, 50]]] * 3
    assert [sorted(layer.flatten().tolist()) for layer in uneven.kept()] == [[33, 67]] * 3
    assert kv._nbytes(every) == kv._nbytes(stock) > kv._nbytes(packed)


def test_a_round_leaves_model_cache_and_library_as_they_were():
    model = make("llama")
    prompt, name = kv.noise(model, 200), model.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for made in kv.kinds(2, len(prompt)).values():
        cache = kv._filled(model, made, prompt)
        with kv._attached(model, made):
            found = kv.timed(model, kv._apart(cache), 2)
        assert cache.get_seq_length() == 200
        assert 0 < found.attention < found.step
    assert attachment(model) is None
    assert (model.config._attn_implementation, ALL_ATTENTION_FUNCTIONS["sdpa"]) == (name, before)


def test_every_cache_is_compared_with_stock(monkeypatch):
    monkeypatch.setattr(kv, "model_of", lambda dim, count: make("llama"))
    monkeypatch.setattr(kv, "STREAM", 1 << 10)
    threads = torch.get_num_threads()
    rows = kv.measure(replace(PLAN, lengths=(16, 32)), lambda settings, name: settings)
    assert [(row["length"], row["cache"]) for row in rows] == [(n, name) for n in (16, 32) for name in kv.kinds(2, 3)]
    for row in rows:
        stock = next(other for other in rows if other["length"] == row["length"])
        assert row["attention_ratio"] == stock["attention"] / row["attention"]
        assert row["step_ratio"] == stock["step"] / row["step"]
        read = row["bytes"] / 3 / row["attention"]                  # a layer's, of the three
        assert row["of_bandwidth"] == pytest.approx(read / row["bandwidth"])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("words", "says"), [
    (["--dims", "96"], "head dimension 96 given, of 64, 128 expected"),
    (["--lengths", "1024,long"], "--lengths: '1024,long' given"), (["--threads", "0"], "--threads: '0' given")])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    assert call(monkeypatch, "bench", "kv", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


@pytest.mark.full
def test_a_quick_round(monkeypatch, capfd):
    assert call(monkeypatch, "bench", "kv", "--quick", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    rows = told["decoding"]
    assert {row["method"] for row in told["scoring"]} == set(scoring.scorers())
    assert {row["length"] for row in rows} == {256, 1024}
    assert all(row["attention"] > 0 and row["bandwidth"] > 0 for row in rows)
