"""`llmopt bench quant` runs each quantizer in a process of its own, on the same tokens, and scores what it wrote."""
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from llmopt_evals import fidelity
from llmopt_evals.bench import quant
from llmopt_evals.bench.rows import rows_of
from llmopt_evals.peers.job import Job
from llmopt_evals.peers.launch import OURS, Failed, Tool, carried_out

from llmopt.calibration import data
from llmopt.errors import LlmoptError
from tests import tiny
from tests.command import call


@pytest.fixture
def folder(tmp_path):
    """A model of random weights, large enough for groups of 32."""
    tiny.make("llama", intermediate_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_steps_get_what_they_do_not_say():
    plan = quant.Plan(methods=tuple(zip("abcd", ("quant.rtn", "[transform.rotate, quant.gptq: {bits: 4}]",
                                                 "quant.rtn: {scheme: FP8}", "quant.rtn: {bits: 2, group_size: -1}"),
                                        strict=True)), bits=(4, 3), peers=(Tool("autoround"),))
    found = [(entry.name, entry.bits, entry.group_size, entry.steps) for entry in quant.entries(plan)]
    assert found == [("a", 4, 32, [{"quant.rtn": {"bits": 4, "group_size": 32}}]),
                     ("b", 4, 32, [{"transform.rotate": {}}, {"quant.gptq": {"bits": 4, "group_size": 32}}]),
                     ("c", 8, -1, [{"quant.rtn": {"scheme": "FP8"}}]),
                     ("d", 2, -1, [{"quant.rtn": {"bits": 2, "group_size": -1}}]),
                     ("a", 3, 32, [{"quant.rtn": {"bits": 3, "group_size": 32}}]),
                     ("autoround", 4, 32, []), ("autoround", 3, 32, [])]


@pytest.mark.parametrize(("word", "says"), [
    ("kv.snapkv", "quantizes no weights"), ("transform.rotate", "quant.* expected behind it"),
    ("quant.gptq: {bitts: 3}", "did you mean 'bits'?"), ("quant.rtn: {group_size: 0}", "group_size")])
def test_what_quantizes_nothing_is_refused(word, says):
    with pytest.raises(LlmoptError) as refused:
        quant.ours_of(word, word, 3, 32)
    assert says in str(refused.value)


@pytest.mark.parametrize(("words", "says"), [
    (["--bits", "4,x"], "--bits: '4,x' given"), (["--group-size", "-2"], "--group-size: '-2' given"),
    (["--peer", "gptq"], "NAME=PYTHON expected"), (["--peer", "autoraund=python"], "did you mean 'autoround'?"),
    (["--peer", f"llmcompressor={sys.executable}"], "-m pip install llmcompressor"),
    (["--peer", "autoround=/nowhere/python"], "cannot be run")])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    assert call(monkeypatch, "bench", "quant", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


def test_rows_of_the_full_length_are_for_all(folder, tmp_path, monkeypatch):
    (tmp_path / "ids.jsonl").write_text("".join(f"{list(range(1, n))}\n" for n in (20, 9, 40, 17, 33, 25, 26)))
    given = quant.DataSpec(name="ids", path=str(tmp_path / "ids.jsonl"), samples=5, length=16)
    ids, held = rows_of(str(folder), given, given, 2, tmp_path)
    assert [json.loads(line) for line in ids.read_text().splitlines()] == [[*range(1, 17)]] * 4
    assert [len(batch["input_ids"]) for batch in held] == [2]


def test_a_tool_that_fails_says_why(folder, tmp_path):
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]\n")
    with pytest.raises(Failed, match="No module named 'llmcompressor'"):
        carried_out(Tool("llmcompressor"), Job(str(folder), str(tmp_path / "ids.jsonl"), 4, 32), tmp_path)


@pytest.mark.full
def test_a_table_of_real_runs(folder, tmp_path, monkeypatch, capfd):
    """One process of its own; the second run takes its checkpoint from the folder that was kept."""
    words = ["bench", "quant", str(folder), "quant.rtn: {clip: false}", "--bits", "3", "--samples", "2", "--length",
             "32", "--rows", "3", "--keep", str(tmp_path / "kept")]
    assert call(monkeypatch, *words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    row, = found["rows"]
    assert found["data"] == {"source": "self", "rows": 2, "tokens": 32, "scored_rows": 3}
    assert 0 < row["cpu_solver"] < row["cpu_process"]
    made, = (path for path in (tmp_path / "kept").iterdir() if path.is_dir())
    assert row["bytes"] == (made / "model.safetensors").stat().st_size
    assert row["kl"] == pytest.approx(sum(row["kl_rows"]) / 3) and row["kl"] > 0
    assert call(monkeypatch, *words) == 0
    assert f"{row['cpu_process']:.1f}" in capfd.readouterr().out


def test_the_dense_model_is_asked_once(tmp_path, monkeypatch):
    ids = tiny.ids(3, 24)
    dense, other = tiny.make("llama"), tiny.make("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    rows = data.as_batches(ids.tolist(), tiny.VOCABULARY, 3)
    asked = []

    def draw(model, words):
        asked.append(model)
        return rows

    with fidelity.reference(nullcontext((dense, None)), draw, tmp_path) as against:
        far, near, again = (against(nullcontext((model, None))) for model in (other, dense, other))
    assert asked == [dense]
    assert all(torch.equal(one.kl, two.kl) for one, two in zip(far, again, strict=True))
    assert max(float(one.kl.max()) for one in near) < 2e-6 < min(float(one.kl.max()) for one in far)


def test_differences_are_those_of_the_same_rows():
    rows = [{"method": "a", "bits": bits, "group_size": 32, "kl": sum(kl) / 3, "kl_rows": kl}
            for bits, kl in ((3, [0.5, 2.0, 0.2]), (3, [0.4, 1.8, 0.2]), (2, [7.0, 8.0, 9.0]))]
    far, near, alone = quant.beside_the_best([*rows, {"method": "b", "bits": 3, "group_size": 32, "failed": "so"}])[:3]
    assert (near["beyond"], alone["beyond"]) == (0, 0)
    assert far["beyond"] == pytest.approx(0.1)
    assert far["beyond_stderr"] == pytest.approx(0.1 / 3 ** 0.5)


@pytest.mark.full
def test_a_quick_round(monkeypatch, capfd):
    assert call(monkeypatch, "bench", "quant", "--quick", "--json") == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == list(quant.METHODS)
    assert len({row["bytes"] for row in rows}) == 1 and {row["tool"] for row in rows} == {OURS}
