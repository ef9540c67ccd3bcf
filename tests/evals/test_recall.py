"""Texts read once for all settings: the answers are those of a prefill under each method, the words find their way."""
import json
from random import Random

import pytest
import torch
from click.testing import CliRunner
from llmopt_evals import contexts, entries, needles, recall
from llmopt_evals.evaluate import evaluate
from llmopt_evals.facts import drawn
from llmopt_evals.texts import documents

import llmopt
from llmopt.heads.replay import Replay
from llmopt.kv import KVzap
from llmopt.method import Run
from tests import tiny
from tests.evals.test_needles import TEXT

PLAN = {"lengths": [220], "documents": 2, "needles": 3, "facts": "mixed"}
METHODS = ["kv.streaming", "kv.snapkv: {window: 8, allocate: global}", "kv.expected: {allocate: ada}", "kv.h2o",
           "kv.kvzip: {chunk: 64}", "[kv.keydiff, kv.quant: {residual: 8, bits: 3}]",
           "kv.quant: {residual: 4, bits: 2}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a model "m" and a text "t.txt", the model, its tokenizer)."""
    folder = tmp_path_factory.mktemp("recall")
    tokenizer = tiny.tokenizer([TEXT, *(fact.told + fact.asked("aware") for fact in drawn("mixed", 8, Random(7)))])
    model = tiny.make("llama", vocab_size=len(tokenizer))
    llmopt.save(model, folder / "m")
    tokenizer.save_pretrained(folder / "m")
    (folder / "t.txt").write_text(TEXT)
    return folder, model, tokenizer


def run(*words):
    return CliRunner().invoke(recall.main, [str(word) for word in words])


@pytest.mark.parametrize("words", METHODS)
def test_answers_are_those_of_a_prefill_under_the_method(made, words):
    folder, model, tokenizer = made
    texts = contexts.of_text(documents(str(folder / "t.txt")), tokenizer, needles.Plan(**PLAN), 512, contexts.FORMS)
    run_ = Run(tokenizer=tokenizer)
    settings = [*entries.settings([words], [0.6], model, run_)]
    dense, *found = recall.measure(model, texts, settings, contexts.FORMS)
    assert dense.row()["held"] == 1 and not dense.ratio
    with llmopt.attached(model, *entries.made(words, 0.6), run=run_):
        want = evaluate(model, ["needles"], tokenizer, text=str(folder / "t.txt"), options=PLAN)["results"]
    for tally in (found[0], found[2]):
        of_task = want[f"needles_{tally.form}"]
        assert tally.setting == words and tally.asked == 6
        assert tally.exact / 6 == of_task["exact,none"]
        assert -tally.loss / 6 == pytest.approx(of_task["logprob,none"], rel=1e-4)
    assert found[0].nats != pytest.approx(dense.nats, rel=1e-3)


def test_methods_of_a_checkpoint_are_taken_with_what_they_have_learned(made, tmp_path):
    """Fitted once by compress; asked at two ratios beside the entries that learn from the same data here."""
    folder, _, tokenizer = made
    steps = ["heads.replay: {length: 64, chunk: 32, sinks: 1, window: 4}", "kv.kvzap: {allocate: captured, window: 4}"]
    data = ["--data", folder / "t.txt", "--samples", "4", "--length", "64"]
    (tmp_path / "r.yaml").write_text("\n".join([
        f"model: {{id: {folder / 'm'}}}", f"data: {{name: text, path: {folder / 't.txt'}, samples: 4, length: 64}}",
        "steps:", f"  - {steps[0]}", f"  - {steps[1][:-1]}, ratio: 0.2}}", "eval: {tasks: []}"]))
    llmopt.run(str(tmp_path / "r.yaml"), tmp_path / "out")
    shown = run(folder / "m", "--text", folder / "t.txt", "--lengths", "220", "--documents", "1", "--needles", "3",
                "--ratios", ".5,.8", "--plot", tmp_path / "p.png", *data, "--json", *steps, tmp_path / "out",
                "kv.knorm")
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)
    assert [row["ratio"] for row in rows] == [None, 0.5, 0.8, 0.5, 0.8, 0.5, 0.8]
    for own, kept in zip(rows[1:3], rows[3:5], strict=True):
        assert kept["setting"] == str(tmp_path / "out") and kept["nats"] == pytest.approx(own["nats"], rel=1e-5)
        assert kept["held"] == own["held"] == pytest.approx(1 - own["ratio"], abs=0.02)
    assert rows[1]["nats"] != rows[5]["nats"] and (tmp_path / "p.png").stat().st_size > 1000


def test_a_scorer_learns_once_for_all_that_score_alike(made, monkeypatch):
    _, model, tokenizer = made
    rows = {"input_ids": tiny.ids(2, 64), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
    run_ = Run([rows], tokenizer=tokenizer)
    Replay(length=64, chunk=32, sinks=1, window=4).apply(model, run_)
    words = [f"kv.kvzap: {{{fields}}}" for fields in ("allocate: captured", "allocate: fisher, sinks: 1",
                                                      "allocate: profile, demote: 0.5", "features: hidden")]
    want, learned, learn = [entries.made(word, 0.5)[0].plan(model, run_) for word in words], [], KVzap.learn
    monkeypatch.setattr(KVzap, "learn", lambda self, *given: learned.append(self.features) or learn(self, *given))
    found = [setting.parts[0][1] for setting in entries.settings(words, [0.5], model, run_)]
    assert learned == ["all", "hidden"]
    for record, own in zip(found, want, strict=True):
        assert record.meta == own.meta and record.tensors.keys() == own.tensors.keys()
        assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in record.tensors.items())


def test_the_world_is_asked_where_no_text_is_given():
    shown = run("llmopt/reference", "--statements", "20", "--documents", "1", "--needles", "4", "--form", "both",
                "--ratios", ".5", "kv.kvzip: {window: 4}")
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [line[0] for line in lines] == ["agnostic", "4/4", lines[2][0], "aware", "4/4", lines[5][0]]
    assert [line[2] for line in lines if line[-1] == "dense"] == ["100.00%", "100.00%"] and float(lines[2][2][:-1]) < 53


@pytest.mark.parametrize(("words", "fact"), [
    (["kv.snapkw"], "did you mean 'kv.snapkv'"), (["quant.rtn"], "quant.rtn: methods that act on the cache expected"),
    (["kv.kvzap"], "kv.kvzap: kv.kvzap needs the step heads.replay before it"),
    (["kv.knorm", "--ratios", "1"], "--ratios: '1' given, numbers from 0 to below 1"),
    (["{a: {}, b: {}}"], "NAME or {NAME: {FIELD: VALUE}} expected"), (["m"], "m: this folder holds no method"),
    (["kv.knorm", "--plot", "p.txt"], "p.txt: a plot is a .png"),
    (["--lengths", "x"], "--lengths: 'x' given")], ids=str)
def test_bad_words_are_one_line(made, words, fact, monkeypatch):
    monkeypatch.chdir(made[0])
    shown = run(made[0] / "m", "--text", made[0] / "t.txt", *words)
    errors = [line for line in shown.output.splitlines() if line.startswith("error: ")]
    assert shown.exit_code == 2 and len(errors) == 1 and fact in errors[0]


def test_a_model_of_other_words_needs_a_text(made):
    shown = run(made[0] / "m", "kv.knorm")
    assert shown.exit_code == 2 and "--text FILE is needed" in shown.output
