"""The lm-eval model class: equal to `hf` where nothing is dropped, and really under compression where something is."""
import pytest
import torch
from llmopt_evals.evaluate import evaluate, figures, task_manager
from llmopt_evals.lm import LlmoptLM
from lm_eval.models.huggingface import HFLM

import llmopt

TASKS = ["world_ppl", "world_facts", "world_copy", "world_recall_40_agnostic"]


@pytest.fixture(scope="module")
def reference():
    return llmopt.load("llmopt/reference", dtype=torch.float32)


@pytest.fixture(scope="module")
def dense(reference):
    """The figures of lm-eval's own class."""
    from lm_eval import simple_evaluate

    model, tokenizer = reference
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    return figures(simple_evaluate(model=lm, tasks=TASKS, task_manager=task_manager(TASKS), limit=8, bootstrap_iters=0))


def scored(reference) -> list[tuple[str, str, float]]:
    model, tokenizer = reference
    return figures(evaluate(model, TASKS, tokenizer, limit=8, batch_size=4))


def assert_equal(found, expected):
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-5)


def test_without_methods_it_is_hf(reference, dense):
    assert_equal(scored(reference), dense)


def test_with_a_budget_for_everything_it_is_hf(reference, dense):
    with llmopt.attached(reference[0], llmopt.kv.SnapKV(budget=4096)):
        assert_equal(scored(reference), dense)


def test_eviction_is_in_force(reference, dense):
    with llmopt.attached(reference[0], llmopt.kv.Streaming(budget=32)):
        found = {(task, metric): value for task, metric, value in scored(reference)}
    before = {(task, metric): value for task, metric, value in dense}
    assert found["world_recall_40_agnostic", "acc"] < before["world_recall_40_agnostic", "acc"] - 0.3
    assert found["world_ppl", "word_perplexity"] > before["world_ppl", "word_perplexity"]


def test_multi_token_continuations_are_scored_token_by_token(reference):
    model, tokenizer = reference
    context, continuation = list(range(20, 60)), list(range(60, 70))
    with llmopt.attached(model, llmopt.kv.Streaming(budget=24)):
        lm = LlmoptLM(pretrained=model, tokenizer=tokenizer, device="cpu")
        (total, _), = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
        with torch.no_grad():
            cache = model(torch.tensor([context]), use_cache=True)
            last, parts = cache.logits[0, -1], []
            for token in continuation:
                parts.append(last.log_softmax(-1)[token].item())
                last = model(torch.tensor([[token]]), past_key_values=cache.past_key_values).logits[0, -1]
    assert total == pytest.approx(sum(parts), rel=1e-4)
