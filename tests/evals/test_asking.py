"""The options of lm-eval's own command: read, checked, and in force."""
import json

import pytest
from llmopt_evals import batching, kept
from llmopt_evals import evaluate as runs
from llmopt_evals.asking import Asking, generation, seeds
from llmopt_evals.lm import LlmoptLM, up_to
from llmopt_evals.readout import CHUNK
from llmopt_evals.world import reference_path

from llmopt.errors import LlmoptError
from llmopt.model.loading import load_tokenizer
from llmopt.scale.processes import Ranks
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call

TASK = """task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{max_gen_toks: 9}}
metric_list: [{{metric: exact_match}}]
"""
REFERENCE = ("eval", "llmopt/reference", "--limit", "2", "--tasks")


@pytest.mark.parametrize(("given", "found"), [
    (["temperature=0.7,do_sample=true"], {"temperature": 0.7, "do_sample": True}),
    (["top_k=5", "until=[a, b],max_gen_toks=3"], {"top_k": 5, "until": ["a", "b"], "max_gen_toks": 3}),
    (['{"temperature": 0, "until": "x,y"}'], {"temperature": 0, "until": "x,y"}), ([], {})])
def test_generation_options_are_read_as_lm_eval_writes_them(given, found):
    assert generation(tuple(given)) == found


@pytest.mark.parametrize(("text", "found"), [("7", (7,) * 4), ("0,1234,None,5", (0, 1234, None, 5))])
def test_seeds_are_one_or_four(text, found):
    assert seeds(text) == found


@pytest.mark.parametrize(("words", "expected"), [
    (["--gen_kwargs", "temprature=0"], "--gen_kwargs: 'temprature' is nothing that generation knows (did you mean "
                                       "'temperature'?)"),
    (["--gen_kwargs", "temperature=hot"], "--gen_kwargs temperature: 'hot' given, a number from 0 expected"),
    (["--gen_kwargs", "top_p=2"], "a number from 0 to 1 expected"),
    (["--gen_kwargs", "max_gen_toks=0"], "a whole number from 1 expected"),
    (["--gen_kwargs", "do_sample=1"], "true or false expected"),
    (["--gen_kwargs", "temperature"], "KEY=VALUE,KEY=VALUE expected"),
    (["--seed", "1,2"], "--seed: '1,2' given, one number for all, or four"),
    (["--batch-size", "0"], "a number from 1, auto or auto:N expected"),
    (["--batch_size", "automatic"], "a number from 1, auto or auto:N expected"),
    (["--num_fewshot", "-1"], "not in the range"),
    (["--fewshot_as_multiturn"], "give --apply_chat_template too"),
    (["--apply-chat-template", "rag"], "llmopt/reference has one template, without a name"),
    (["--log_samples"], "--log_samples needs --output"),
    (["--include_path", "nowhere"], "is no folder"),
    (["--include_path", "."], "give --trust-remote-code on the command line"),
])
def test_a_wrong_value_is_one_line_before_any_work(words, expected, monkeypatch, capfd):
    assert call(monkeypatch, *REFERENCE, "world_copy", *words) == 2
    errors = capfd.readouterr().err
    assert expected in errors
    assert len(errors.strip().splitlines()) == 1


def test_examples_template_and_instruction_reach_the_model(tmp_path, monkeypatch, capfd):
    words = ("--num-fewshot", "1", "--apply_chat_template", "--system_instruction", "the fox runs .", "--batch_size",
             "auto", "--output", tmp_path / "r.json", "--log_samples", "--seed", "3")
    assert call(monkeypatch, *REFERENCE, "world_copy", *words) == 0, capfd.readouterr().err
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["n-shot"] == {"world_copy": 1}
    assert results["config"]["seeds"] == [3] * 4
    rows = [json.loads(line) for line in (tmp_path / "r.world_copy.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    context = rows[0]["arguments"][0][0]
    assert context.count("the fox runs .") == 1
    assert context.count("user") >= 2, context              # a turn for the example, one for the question
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.world_copy.jsonl"}


def test_tasks_of_a_folder_are_asked_and_generation_obeys_the_command(tmp_path, monkeypatch, capfd):
    (tmp_path / "d.jsonl").write_text('{"q": "the fox", "a": "runs"}\n{"q": "the owl", "a": "sleeps"}\n')
    (tmp_path / "story.yaml").write_text(TASK.format(data=tmp_path / "d.jsonl"))
    words = ("--include-path", tmp_path, "--trust-remote-code", "--gen_kwargs", "max_gen_toks=2", "--output",
             tmp_path / "r.json", "--log_samples", "--batch_size", "auto")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert call(monkeypatch, *REFERENCE, "story", *words) == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "r.story.jsonl").read_text().splitlines()]
    assert [len(row["resps"][0][0].split()) for row in rows] == [2, 2]


def test_a_dense_score_is_kept_for_the_setting_it_was_measured_with(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    done, real = [], runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda *given: done.append(given[-1]) or real(*given))

    def kept_dates(asking: Asking) -> dict[str, str]:
        results, dates = kept.scores(ModelSpec(), ["world_copy"], 2, 16, None, Ranks(), asking=asking)
        assert results["n-shot"] == {"world_copy": asking.num_fewshot or 0}
        return dates

    settings = [Asking(), Asking(num_fewshot=1), Asking(num_fewshot=1, seeds=(1,) * 4),
                Asking(apply_chat_template=True), Asking(system_instruction="the fox runs .")]
    assert not any(kept_dates(asking) for asking in settings)
    assert all(kept_dates(asking) for asking in settings)
    assert done == settings
    assert not kept_dates(Asking(log_samples=True))             # answers are not kept
    assert kept_dates(Asking())                                 # but the score is


def test_a_score_of_a_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    done = []
    monkeypatch.setattr(runs, "evaluate", lambda *given: done.append(given))
    (tmp_path / "t.yaml").write_text("task: t")
    for tasks, asking in [([str(tmp_path / "t.yaml")], Asking()), (["world_copy"], Asking(include_path=str(tmp_path)))]:
        kept.scores(ModelSpec(), tasks, 2, 16, None, Ranks(), asking=asking)
    assert len(done) == 2
    assert not (tmp_path / "cache").exists()


def test_what_may_be_compressed_is_found_behind_a_template():
    assert up_to("a b ", "a b c") == "a b "
    assert up_to("a b ", "<user> x a b c") == "<user> x a b"
    with pytest.raises(LlmoptError, match="ask without it"):
        up_to("a  b", "<user> a b")


def test_an_automatic_batch_is_what_the_memory_holds(monkeypatch):
    model = tiny.make("llama", max_position_embeddings=64)
    lm = LlmoptLM(pretrained=model, tokenizer=load_tokenizer(str(reference_path())), batch_size="auto")
    lm._model_call = None                       # nothing is tried out
    assert lm._detect_batch_size() == lm.max_batch_size == 64
    monkeypatch.setattr(batching, "available", lambda: 2 * CHUNK + 5_000_000)
    assert 1 <= lm._detect_batch_size() < 64
