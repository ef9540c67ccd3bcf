"""The lm-eval tasks build offline and measure what they say, on the reference model."""

import pytest
from llmopt_evals.world import reference_path, split_context, tasks_path
from llmopt_evals.world.questions import text
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from llmopt.errors import LlmoptError

RECALL = [f"world_recall_{count}_{form}" for count in (40, 160) for form in ("aware", "agnostic")]


def run(tasks, limit, metadata=None):
    manager = TaskManager(include_path=str(tasks_path()), include_defaults=False, metadata=metadata)
    arguments = {"pretrained": str(reference_path())}
    return simple_evaluate("hf", arguments, tasks=tasks, limit=limit, task_manager=manager, device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def results():
    return run(["world_recall", "world_facts", "world_copy", "world_ppl"], limit=24)


def test_the_reference_model_knows_its_world(results):
    figures = results["results"]
    assert figures["world_facts"]["acc,none"] >= 0.8
    assert figures["world_copy"]["acc,none"] >= 0.8
    assert all(figures[task]["acc,none"] >= 0.8 for task in RECALL)
    assert 2 < figures["world_ppl"]["word_perplexity,none"] < 9


def test_the_group_is_the_mean_of_its_tasks(results):
    figures = results["results"]
    mean = sum(figures[task]["acc,none"] for task in RECALL) / 4
    assert figures["world_recall"]["acc,none"] == pytest.approx(mean)


def test_documents_record_distance_and_boundary(results):
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    for task in RECALL:
        sample = results["samples"][task][5]
        ids = tokenizer(sample["arguments"][0][0])["input_ids"]
        context, asked = split_context(ids, tokenizer)
        doc = sample["doc"]
        assert ids[len(ids) - doc["distance"]] == tokenizer(doc["answer"])["input_ids"][-1]
        whole = f"{doc['context']} {doc['question']}"
        expected = (doc["context"], doc["question"]) if task.endswith("agnostic") else (whole, "")
        assert (text(context), text(asked)) == expected


def test_any_text_reads_the_named_file(tmp_path, monkeypatch):
    file = tmp_path / "some.txt"
    file.write_text("the fox runs near the river .\n<|endoftext|>\nthe bird sings .")
    monkeypatch.setenv("LLMOPT_TEXT", str(file))
    found = run(["text_ppl"], limit=None)
    assert found["n-samples"]["text_ppl"]["original"] == 2
    assert 1 < found["results"]["text_ppl"]["word_perplexity,none"] < 1000


def test_any_text_without_a_file_says_what_to_do(monkeypatch):
    monkeypatch.delenv("LLMOPT_TEXT", raising=False)
    with pytest.raises(LlmoptError, match="LLMOPT_TEXT"):
        run(["text_ppl"], limit=None)
