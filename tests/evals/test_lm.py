"""The lm-eval model class: equal to `hf` where nothing is dropped, and really under compression where something is."""
import json

import pytest
import torch
from llmopt_evals.evaluate import evaluate, figures, task_manager
from llmopt_evals.lm import LlmoptLM
from llmopt_evals.world import calibration_text, tasks_path
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import llmopt
from tests import warm
from tests.command import call, command

TASKS = ["world_ppl", "world_facts", "world_copy", "world_recall_40_aware", "world_recall_40_agnostic"]


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
    for form in ("aware", "agnostic"):                # one-word answers: read on what was kept, not in the prefill
        assert found[f"world_recall_40_{form}", "acc"] < before[f"world_recall_40_{form}", "acc"] - 0.3
    assert found["world_ppl", "word_perplexity"] > before["world_ppl", "word_perplexity"]


def test_multi_token_continuations_are_scored_token_by_token(reference):
    model, tokenizer = reference
    context, continuation = list(range(20, 60)), list(range(60, 70))
    with llmopt.attached(model, llmopt.kv.Streaming(budget=24)):
        lm = LlmoptLM(pretrained=model, tokenizer=tokenizer, device="cpu")
        (total, _), = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
        with torch.no_grad():
            cache = model(torch.tensor([context]), use_cache=True)
            cache.past_key_values = cache.past_key_values.without_last()
            last, parts = model(torch.tensor([context[-1:]]), past_key_values=cache.past_key_values).logits[0, -1], []
            for token in continuation:
                parts.append(last.log_softmax(-1)[token].item())
                last = model(torch.tensor([[token]]), past_key_values=cache.past_key_values).logits[0, -1]
    assert total == pytest.approx(sum(parts), rel=1e-4)


STORY = calibration_text(3, 200, seed=3)
AWKWARD = [("", " the fox runs"), (STORY[0], " the fox runs near the river ."), (STORY[1], " lamp"),
           (STORY[1], " lamp and stone"), ("the fox", " " + STORY[2]), ("", " <s> the fox")]
GREEDY = {"until": ["."], "max_gen_toks": 12, "do_sample": False}


def requests(kind: str, arguments: list) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def made(cls, reference, **more):
    model, tokenizer = reference
    return cls(pretrained=model, tokenizer=tokenizer, batch_size=3, **more)


def loglikelihoods(lm) -> list:
    return lm.loglikelihood(requests("loglikelihood", AWKWARD), disable_tqdm=True)


def texts(lm, contexts: list[str]) -> list[str]:
    return lm.generate_until(requests("generate_until", [(c, dict(GREEDY)) for c in contexts]), disable_tqdm=True)


@pytest.mark.parametrize("limit", [None, 201], ids=["whole", "truncated"])
@pytest.mark.parametrize("method", [None, llmopt.kv.SnapKV(budget=4096)], ids=["dense", "budget for all"])
def test_awkward_requests_equal_hf(reference, method, limit):
    more = {"max_length": limit} if limit else {}
    expected = loglikelihoods(made(HFLM, reference, **more))
    with llmopt.attached(reference[0], *([method] if method else [])):
        found = loglikelihoods(made(LlmoptLM, reference, **more))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5, abs=1e-5)


def test_generation_equals_hf_and_really_compresses(reference):
    contexts = ["copy rope bell knife lamp stone again", STORY[0], "the fox"]
    expected = texts(made(HFLM, reference), contexts)
    assert texts(made(LlmoptLM, reference), contexts) == expected
    with llmopt.attached(reference[0], llmopt.kv.SnapKV(budget=4096)):
        assert texts(made(LlmoptLM, reference), contexts) == expected
    with llmopt.attached(reference[0], llmopt.kv.Streaming(budget=6, sinks=2)):
        evicted = texts(made(LlmoptLM, reference), contexts)
        assert evicted == [texts(made(LlmoptLM, reference), [c])[0] for c in contexts]      # padding changes nothing
    assert expected[0].strip() == "rope bell knife lamp stone"
    assert evicted[0].split()[0] == "rope"                          # the prefill still saw everything
    assert evicted[0] != expected[0]
    assert evicted[2] == expected[2]                    # two words fit the budget


def test_prompts_that_do_not_fit_together_are_generated_from_one_by_one(reference, monkeypatch):
    lm, rows = made(LlmoptLM, reference), []
    generate = lm._model_generate
    monkeypatch.setattr(lm, "_model_generate", lambda context, **more: (rows.append(len(context)),
                                                                        generate(context=context, **more))[1])
    contexts = ["the fox", "the fox runs", "the fox sleeps"]
    expected = texts(lm, contexts)
    monkeypatch.setattr("llmopt_evals.lm.affordable", lambda model, longest, kept: longest)
    assert texts(lm, contexts) == expected
    assert rows == [3, 1, 1, 1] and lm.batch_size == 3


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """A checkpoint whose cache keeps 8 entries: it recalls nothing of what it has read."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("lm") / "out", llmopt.load("llmopt/reference")
    llmopt.compress(model, llmopt.kv.Streaming(budget=8))
    llmopt.save(model, folder, tokenizer=tokenizer)
    return folder


def test_the_command_scores_a_checkpoint_with_its_small_cache(forgetful, monkeypatch, capfd):
    assert call(monkeypatch, "-q", "eval", forgetful, "--tasks", "world_recall_40_aware", "--limit", "3",
                "--compare", "llmopt/reference", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    small, dense = found[str(forgetful)], found["llmopt/reference"]
    assert small["world_recall_40_aware/acc"] == 0 and dense["world_recall_40_aware/acc"] > 0.9


def test_lm_evals_own_command_knows_the_class(forgetful, tmp_path):
    line = ["-m", "llmopt_evals", "--model", "llmopt", "--model_args", f"pretrained={forgetful}",
            "--tasks", "world_recall_40_aware", "--include_path", str(tasks_path()), "--limit", "3", "--device", "cpu",
            "--output_path", str(tmp_path)]
    run = warm.run(*line, env=command()[1])
    assert run.returncode == 0, run.stderr
    results, = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert [*found["config"]["llmopt"]["steps"][0]["method"]] == ["kv.streaming"]
    assert found["results"]["world_recall_40_aware"]["acc,none"] == 0
