"""`llmopt bench prune` prunes a model anew for each row, on the same tokens, and times what pruning leaves."""
import json
import sys

import pytest
from llmopt_evals.bench import lean, prune
from llmopt_evals.peers.launch import Tool

from llmopt.errors import LlmoptError
from tests import tiny
from tests.command import call

SMALL = ("--samples", "2", "--length", "32", "--rows", "3")


@pytest.fixture
def folder(tmp_path):
    """A model of random weights."""
    tiny.make("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_steps_get_what_they_do_not_say():
    plan = prune.Plan(methods=("prune.wanda", "prune.magnitude: {ratio: 0.5, refit: false}", "[heads.span, prune.obs]"),
                      ratios=(0.1, 0.2), units=("kv_groups",), peers=(Tool("torchpruning"),))
    units = {"units": ["kv_groups"]}
    assert [(entry.name, entry.ratio, list(entry.steps)) for entry in prune.entries(plan)] == [
        ("prune.wanda", 0.1, [{"prune.wanda": {"ratio": 0.1, **units}}]),
        (plan.methods[1], 0.5, [{"prune.magnitude": {"ratio": 0.5, **units, "refit": False}}]),
        (plan.methods[2], 0.1, [{"heads.span": {}}, {"prune.obs": {"ratio": 0.1, **units}}]),
        ("prune.wanda", 0.2, [{"prune.wanda": {"ratio": 0.2, **units}}]),
        (plan.methods[2], 0.2, [{"heads.span": {}}, {"prune.obs": {"ratio": 0.2, **units}}]),
        ("torchpruning", 0.1, []), ("torchpruning", 0.2, [])]


@pytest.mark.parametrize(("word", "says"), [
    ("kv.snapkv", "prune.* expected"), ("heads.span", "prune.* with a ratio expected"),
    ("prune.wanda: {rattio: 0.3}", "did you mean 'ratio'?"), ("prune.wonda", "did you mean 'prune.wanda'?")])
def test_what_prunes_nothing_is_refused(word, says):
    with pytest.raises(LlmoptError) as refused:
        prune.ours_of(word, 0.2, ("ffn",))
    assert says in str(refused.value)


@pytest.mark.parametrize(("words", "says"), [
    (["--ratios", "1"], "--ratios: '1' given"), (["--ratios", "a"], "--ratios: 'a' given"),
    (["--units", "ffm"], "ffn"), (["--peer", "torchprunning=python"], "did you mean 'torchpruning'?"),
    (["--peer", f"torchpruning={sys.executable}"], "-m pip install torch-pruning")])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    assert call(monkeypatch, "bench", "prune", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


@pytest.mark.full
def test_a_table_of_real_runs(folder, tmp_path, monkeypatch, capfd):
    """The same entry twice gives the same figures; one that cannot be met is a row, and the others are measured."""
    words = ["bench", "prune", str(folder), "prune.magnitude: {refit: false}", "prune.magnitude: {minimum: 1}",
             "[prune.magnitude: {ratio: 0, refit: false}]", "--ratios", "0.5", *SMALL, "--keep", str(tmp_path / "kept")]
    assert call(monkeypatch, *words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    cut, refused, dense = found["rows"]
    assert found["data"] == {"source": "self", "rows": 2, "tokens": 32, "scored": "self", "scored_rows": 3}
    assert cut["kl"] > 1e-4 > abs(dense["nats"]) and cut["nats_stderr"] > 0
    assert cut["parameters"] < cut["parameters_before"] == dense["parameters"] == dense["parameters_before"]
    assert "cannot be met" in refused["failed"]
    for file in (tmp_path / "kept").glob("row-*.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"cpu": 12345.0}))
    assert call(monkeypatch, *words) == 0
    assert capfd.readouterr().out.count("12345.0") == 2                     # they were found, not measured again


def test_another_seed_measures_other_rows(folder, tmp_path, monkeypatch, capfd):
    """Rows, draws, and what is kept: not those of the seed before."""
    words = ["bench", "prune", str(folder), "prune.magnitude: {refit: false}", "--ratios", "0.5", *SMALL]
    found = []
    for seed in ("0", "1", "0"):
        assert call(monkeypatch, *words, "--keep", str(tmp_path / "kept"), "--seed", seed, "--json") == 0
        found.append(json.loads(capfd.readouterr().out)["rows"][0])
    assert found[0] == found[2] and found[0]["kl"] != found[1]["kl"]
    assert len(list((tmp_path / "kept").glob("ids-*.jsonl"))) == 2


def test_the_promise_is_that_of_the_operations(monkeypatch):
    """With a clock that counts operations every model keeps exactly what it promises."""
    monkeypatch.setattr(lean, "_seconds", lambda work: 1e-9 * lean._operations(work))
    rows = lean.measure(lean.QUICK, lambda rounds, name: rounds)
    assert [(row["ratio"], row["work"]) for row in rows] == [
        (ratio, work) for ratio in (0.0, 0.25, 0.5) for work in ("prefill", "decoding")]
    assert all(row["of_promise"] == pytest.approx(1) for row in rows)
    assert rows[0]["operations"] > rows[2]["operations"] > rows[4]["operations"] > rows[1]["operations"]
    assert rows[4]["faster"] == pytest.approx(rows[0]["operations"] / rows[4]["operations"])


def test_experts_that_are_skipped_stand_beside_pruners():
    skip, top = (prune.ours_of(word, 0.5, ("ffn",)) for word in ("experts.skip: {ratio: 0.3}", "experts.top_k"))
    assert (skip.ratio, top.ratio) == (0.3, 0.5)
    assert (skip.steps, top.steps) == (({"experts.skip": {"ratio": 0.3}},), ({"experts.top_k": {}},))
