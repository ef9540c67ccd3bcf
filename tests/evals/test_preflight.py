"""The evaluation looked at before the work: tasks, texts, vocabularies; and what is there when it fails."""
import json

import pytest
import torch
from llmopt_evals import evaluate as scores
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmopt.cli import commands
from llmopt.run import dry_run
from tests import tiny
from tests.command import call

RECIPE = "steps:\n  - quant.rtn: {bits: 4, group_size: 16}\n" \
         "eval: {tasks: [world_copy, text_ppl], text: t.txt, limit: 1}\n"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model whose words are its own, and a text in them."""
    folder = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    tiny.make("llama").save_pretrained(folder / "m")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "c"])}
    own = Tokenizer(models.WordLevel(words, unk_token="a"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>",
                            pad_token="<pad>").save_pretrained(folder / "m")
    (folder / "t.txt").write_text("a b c a b\n<|endoftext|>\nc a")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def run(stranger, monkeypatch, capfd, tmp_path):
    """(exit code, output, errors) of the command in the stranger's folder; `out` is gone before."""
    monkeypatch.chdir(stranger)
    monkeypatch.delenv("LLMOPT_TEXT", raising=False)

    def told(*words):
        capfd.readouterr()
        return call(monkeypatch, *words), *capfd.readouterr()

    return told


def compress(output, *more):
    return "compress", "--recipe", "r.yaml", "--model", "m", "--output", output, *more


def test_a_packaged_recipe_runs_on_any_model(run, stranger, tmp_path):
    code, out, errors = run(*compress(tmp_path / "out"))
    assert code == 0
    assert "text_ppl" in out
    assert "world_copy" not in out
    line, = [line for line in errors.splitlines() if "not scored" in line]
    assert "not scored: world_copy, written in the vocabulary of llmopt/reference" in line
    assert "Instead: fidelity. More, later: llmopt eval" in line
    assert "KL to the dense model (nats a token)" in out


@pytest.mark.parametrize(("more", "fact"), [
    (("--set", "eval.tasks=[world_copy]"), "world_copy: written in the vocabulary of llmopt/reference"),
    (("--set", "eval.text=no.txt"), "text no.txt: there is no such file"),
    (("--set", "eval.text=."), "a file expected"), (("--set", "eval.text=null"), "no text is given"),
    (("--set", "eval.tasks=[arc_easy]"), "arc_easy cannot be run"),
], ids=["world by name", "no file", "folder", "no text", "no network"])
def test_what_cannot_be_scored_is_told_before_the_work(run, tmp_path, more, fact):
    code, out, errors = run(*compress(tmp_path / "out", *more))
    assert (code, out) == (2, "")
    assert fact in errors
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("more", "fact"), [
    ("eval.text=no.txt", "text no.txt: there is no such file"),
    ("eval.tasks=[world_cope]", "did you mean 'world_copy'"),
], ids=["no file", "no such task"])
def test_a_dry_run_refuses_what_the_run_would(run, more, fact, monkeypatch):
    monkeypatch.setattr(dry_run, "dry_run", None)           # before anything is rehearsed
    code, out, errors = run("compress", "--recipe", "r.yaml", "--model", "m", "--dry-run", "--set", more)
    assert (code, out) == (2, "")
    assert fact in errors
    assert len(errors.splitlines()) == 1


def test_eval_refuses_the_world_by_name_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(scores, "evaluate", None)
    code, out, errors = run("eval", "m", "--tasks", "world_ppl")
    assert (code, out) == (2, "")
    assert "For any model: --tasks text_ppl,needles" in errors


def test_a_text_reaches_its_task_from_the_command_and_its_home_is_known(run, stranger, monkeypatch):
    monkeypatch.setenv("HOME", str(stranger))
    code, out, _ = run("eval", "m", "--tasks", "text_ppl", "--text", "~/t.txt", "--json")
    assert code == 0
    assert json.loads(out)["m"]["text_ppl/word_perplexity"] > 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), commands.LlmoptError("the disk is on fire")], ids=str)
def test_a_checkpoint_that_is_not_scored_is_there_with_its_sizes(run, tmp_path, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(scores, "evaluate", fails)
    output = tmp_path / "out"
    code, out, errors = run(*compress(output, "--set", "eval.tasks=[text_ppl]"))
    assert code == (2 if str(error) else 130)
    assert "cache bytes per token" in out
    assert f"the checkpoint in {output} is finished" in errors
    assert f"llmopt eval {output} --tasks text_ppl --compare m" in errors
    assert "| file size |" in (output / "README.md").read_text()
    monkeypatch.undo()


def test_what_was_not_scored_can_be_scored_later(run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert run(*compress(output, "--no-eval"))[0] == 0
    code, out, _ = run(*compress(output, "--resume"))
    assert code == 0
    assert "text_ppl" in out
    assert set(json.loads((output / "llmopt.json").read_text())["scores"]) == {"before", "after"}
