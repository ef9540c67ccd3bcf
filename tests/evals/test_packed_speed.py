"""`llmopt bench packed` multiplies with what it says, and models come in processes of their own."""
import json

import pytest
import torch
from llmopt_evals.bench import packed

import llmopt
from tests import tiny
from tests.command import call

PLAN = packed.Plan(size=64, bits=(4, 3), rows=(1, 5), group=32, rounds=1)


def test_each_weight_is_compared_with_the_dense_ones(monkeypatch):
    monkeypatch.setattr(packed, "CACHES", 1 << 14)
    monkeypatch.setattr(packed, "bandwidth", lambda clock: 1e9)
    threads = torch.get_num_threads()
    rows = packed.measure(PLAN, lambda settings, name: settings)
    assert [(row["bits"], row["type"], row["rows"]) for row in rows] == [
        (bits, name, count) for bits, name in ((32, "fp32"), (16, "bf16"), (4, "fp32"), (4, "bf16"), (3, "fp32"),
                                               (3, "bf16")) for count in (1, 5)]
    dense = {row["rows"]: row["seconds"] for row in rows if row["bits"] == 32}
    for row in rows:
        assert row["against_fp32"] == dense[row["rows"]] / row["seconds"]
        assert row["of_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert (row["way"] == "dense") == (row["bits"] >= 16)
    assert rows[4]["bytes"] < rows[2]["bytes"] / 2 and torch.get_num_threads() == threads


def test_weights_take_turns(monkeypatch):
    monkeypatch.setattr(packed, "CACHES", 1 << 14)
    weights = packed._weights(PLAN, 4, torch.bfloat16)
    assert len(weights) == 1 + packed.CACHES // weights[0].nbytes
    assert len({weight.scales.data_ptr() for weight in weights[:3]}) == 3


@pytest.mark.parametrize(("words", "says"), [
    (["--bits", "9"], "9 bits given, 2 to 8 expected"), (["--rows", "0"], "--rows: '0' given"),
    (["--size", "100"], "groups of 128 do not divide a width of 100"),
    (["--model", "nowhere"], "nowhere: a model folder expected")])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    assert call(monkeypatch, "bench", "packed", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


def test_tables_name_the_way(monkeypatch, capfd):
    monkeypatch.setattr(packed, "QUICK", PLAN)
    monkeypatch.setattr(packed, "CACHES", 1 << 14)
    monkeypatch.setattr(packed, "bandwidth", lambda clock: 1e9)
    assert call(monkeypatch, "bench", "packed", "--quick") == 0
    out = capfd.readouterr().out
    assert "blocks" in out and "dense" in out and "memory is read at 1.0 GB/s" in out


@pytest.mark.full
def test_models_are_measured_in_processes_of_their_own(tmp_path, monkeypatch, capfd):
    model = tiny.make("llama", torch.bfloat16, hidden_size=256, intermediate_size=512)
    model.save_pretrained(tmp_path / "dense")
    llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=64)])
    llmopt.save(model, tmp_path / "small")
    words = ("bench", "packed", "--model", tmp_path / "small", "--dense", tmp_path / "dense", "--json")
    assert call(monkeypatch, *words) == 0
    rows = {row["model"]: row for row in json.loads(capfd.readouterr().out)}
    assert list(rows) == ["packed", "plain", "dense"]
    assert rows["packed"]["tensors"] < 0.5 * rows["plain"]["tensors"] and rows["packed"]["token"] > 0
