"""`fidelity` from the command: what a run ends in, `llmopt eval`, and models that cannot be compared."""
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from llmopt_evals import pairs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmopt
from llmopt.errors import LlmoptError
from llmopt.specs import DataSpec, EvalSpec, ModelSpec
from tests import tiny
from tests.command import call

RECIPE = """
data: {name: text, path: t.txt, samples: 2, length: 24}
steps:
  - quant.rtn: {bits: 3, group_size: 32}
  - kv.snapkv: {ratio: 0.5, window: 2}
"""
LABELS = ("KL to the dense model (nats a token)", "first choice agrees", "perplexity")


def words(count: int) -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="w0", eos_token="w2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model m, one of another vocabulary, a text in their words, and `out`, made of m by a recipe without `eval`."""
    folder = tmp_path_factory.mktemp("place")
    tiny.make("llama").save_pretrained(folder / "m")
    words(tiny.VOCABULARY).save_pretrained(folder / "m")
    tiny.make("llama", vocab_size=90).save_pretrained(folder / "other")
    draw = random.Random(0)
    (folder / "t.txt").write_text("\n<|endoftext|>\n".join(
        " ".join(f"w{draw.randrange(3, 90)}" for _ in range(600)) for _ in range(8)))
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("llmopt_evals.pairs.ROWS", 6)
        assert call(patch, "compress", "--recipe", "r.yaml", "--model", "m", "--output", "out") == 0
    return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
    """(exit code, output, errors) of a command in that folder."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("llmopt_evals.pairs.ROWS", 6)

    def told(*given):
        capfd.readouterr()
        return call(monkeypatch, *given), *capfd.readouterr()

    return told


def test_a_run_without_an_eval_section_ends_in_distances_with_their_errors(place):
    facts = json.loads((place / "out" / "llmopt.json").read_text())
    values = {which: {metric: value for _, metric, value in rows} for which, rows in facts["scores"].items()}
    errors = {which: {metric: value for _, metric, value in rows} for which, rows in facts["errors"].items()}
    assert set(values["before"]) == set(errors["before"]) == {"perplexity"}
    assert set(values["after"]) - set(errors["after"]) == {"kl_p99", "kl_max"}
    assert 0.01 < values["after"]["kl"] < values["after"]["kl_p99"] <= values["after"]["kl_max"]
    rows = {row[0]: row[1:] for row in facts["table"]}
    for label, metric in zip(LABELS, ("kl", "agreement", "perplexity"), strict=True):
        assert rows[label][1] == f"{values['after'][metric]:.4f} ± {errors['after'][metric]:.4f}"
        assert f"| {label} | {rows[label][0]} | {rows[label][1]} |" in (place / "out" / "README.md").read_text()
    assert rows[LABELS[0]][0] == "-" and rows[LABELS[2]][0].startswith(f"{values['before']['perplexity']:.4f} ± ")
    kept = json.loads((place / "out" / "eval-after.json").read_text())
    assert kept["results"]["fidelity"]["kl,none"] == values["after"]["kl"]
    assert kept["n-samples"]["fidelity"]["effective"] == 6
    assert sorted(file.name for file in place.iterdir()) == ["m", "other", "out", "r.yaml", "t.txt"]


def test_a_checkpoint_is_measured_against_the_model_that_it_records_or_the_one_that_is_named(run, place):
    scores = json.loads((place / "out" / "llmopt.json").read_text())["scores"]["after"]
    code, out, _ = run("eval", "out", "--tasks", "fidelity", "--json")
    found = json.loads(out)
    assert code == 0 and list(found["m"]) == ["fidelity/perplexity", "fidelity/perplexity_stderr"]
    assert {f"fidelity/{metric}": pytest.approx(value, rel=1e-5) for _, metric, value in scores}.items() <= \
        found["out"].items()
    code, out, errors = run("eval", "out", "--tasks", "fidelity", "--compare", "m", "--data", "t.txt", "--limit", "3")
    assert code == 0 and " ± " in out and "comparing out with m" in errors
    code, out, _ = run("eval", "m", "--tasks", "fidelity", "--compare", "m", "--data", "t.txt", "--json")
    assert code == 0 and json.loads(out)["m"]["fidelity/kl"] < 1e-6


@pytest.mark.parametrize(("given", "fact"), [
    (("m", "--tasks", "fidelity"), "m does not tell which: --compare DENSE"),
    (("out", "--tasks", "fidelity", "--compare", "other"), "out has a vocabulary of 96 tokens, other of 90"),
    (("out", "--tasks", "text_ppl", "--data", "t.txt"), "--tasks does not name it"),
    (("out", "--tasks", "fidelity", "--data", "no.txt"), "no.txt"),
    (("lost", "--tasks", "fidelity"), "lost was made of gone, which cannot be had any more"),
    (("out", "--tasks", "fidelity", "--compare", "renamed"), "have different words"),
], ids=["no dense", "vocabulary", "data for nothing", "no data", "gone", "words"])
def test_what_cannot_be_compared_is_told_before_the_work(run, place, given, fact, tmp_path):
    shutil.copytree(place / "out", tmp_path / "lost")
    facts = json.loads((tmp_path / "lost" / "llmopt.json").read_text())
    facts["recipe"]["model"]["id"] = "gone"
    (tmp_path / "lost" / "llmopt.json").write_text(json.dumps(facts))
    shutil.copytree(place / "m", tmp_path / "renamed")
    renamed = words(tiny.VOCABULARY - 1)
    renamed.add_tokens(["other"])
    renamed.save_pretrained(tmp_path / "renamed")
    given = [str(tmp_path / word) if word in ("lost", "renamed") else word for word in given]
    code, out, errors = run("eval", *given)
    assert (code, out) == (2, "") and fact in errors and len(errors.splitlines()) == 1


def test_a_model_larger_than_memory_is_not_asked_to_write_rows(place, monkeypatch):
    monkeypatch.setattr(pairs, "available", lambda: 1000)
    dense = ModelSpec(id=str(place / "m"))
    assert "larger than memory" in pairs.obstacle(dense, DataSpec(name="self"))
    assert pairs.obstacle(dense, DataSpec(name="text", path=str(place / "t.txt"))) is None
    with pytest.raises(LlmoptError, match="there is no such file"):
        pairs.obstacle(dense, DataSpec(name="text", path="no.txt"))
    hollow = SimpleNamespace(parameters=lambda: iter([torch.empty(1, device="meta")]))
    with pytest.raises(LlmoptError, match="larger than memory cannot write the rows"):
        pairs.draw(DataSpec(name="self"), 2)(hollow, None)


def test_scores_of_both_kinds_stand_in_one_result():
    ours = pairs.as_results({"kl": (0.5, None)}, 4)
    theirs = {"results": {"t": {"acc,none": 1.0}}, "config": {"model": "x"}, "samples": {"t": []}}
    both = pairs.joined(theirs, ours)
    assert both["results"] == {"t": {"acc,none": 1.0}, "fidelity": {"alias": "fidelity", "kl,none": 0.5,
                                                                    "kl_stderr,none": "N/A"}}
    assert both["config"] == {"model": "x"} and both["samples"] == {"t": []}
    assert EvalSpec().tasks == ["fidelity"]


def test_python_measures_a_model_in_memory_or_by_its_name(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    text = str(shutil.copy("t.txt", tmp_path))              # of t.txt itself the checkpoint records what it has seen
    monkeypatch.setattr("llmopt_evals.pairs.ROWS", 3)
    named = llmopt.evaluate("out", "fidelity", compare="m", data=text)["fidelity"]
    loaded = llmopt.evaluate(llmopt.load("out"), ["fidelity"], compare=llmopt.load("m"), data=text)["fidelity"]
    assert loaded == pytest.approx(named, rel=1e-4) and named["kl"] > named["kl_stderr"] > 0
    with pytest.raises(LlmoptError, match="compare=DENSE"):
        llmopt.evaluate(llmopt.load("out"), "fidelity")
