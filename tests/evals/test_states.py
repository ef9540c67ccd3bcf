"""Evaluation of hybrids, whose states cannot take a context's last token back: it is read on what was kept alone."""
from random import Random

import pytest
import torch
from llmopt_evals import contexts, entries, needles, recall
from llmopt_evals.continuations import Text, costs
from llmopt_evals.evaluate import evaluate
from llmopt_evals.lm import LlmoptLM
from llmopt_evals.texts import documents
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import cross_entropy

import llmopt
from llmopt.method import Record, Run
from tests import tiny
from tests.evals.test_recall import PLAN, TEXT, drawn

SNAP = "kv.snapkv: {window: 8}"


@pytest.fixture(scope="module")
def made():
    tokenizer = tiny.tokenizer([TEXT, *(fact.told + fact.asked("aware") for fact in drawn("mixed", 8, Random(7)))])
    return tiny.make("lfm2", vocab_size=len(tokenizer)), tokenizer


def test_answers_are_those_of_a_prefill_under_the_method(made, tmp_path):
    (model, tokenizer), file = made, tmp_path / "t.txt"
    file.write_text(TEXT)
    texts = contexts.of_text(documents(str(file)), tokenizer, needles.Plan(**PLAN), 512, contexts.FORMS)
    run = Run(tokenizer=tokenizer)
    dense, *found = recall.measure(model, texts, [*entries.settings([SNAP], [0.6], model, run)], contexts.FORMS)
    with llmopt.attached(model, *entries.made(SNAP, 0.6), run=run):
        want = evaluate(model, ["needles"], tokenizer, text=str(file), options=PLAN)["results"]
    for tally in (found[0], found[2]):
        of_task = want[f"needles_{tally.form}"]
        assert tally.asked == 6 and tally.exact / 6 == of_task["exact,none"]
        assert -tally.loss / 6 == pytest.approx(of_task["logprob,none"], rel=1e-4)
    assert found[0].nats != pytest.approx(dense.nats, rel=1e-3)


@pytest.mark.parametrize("context", [40, 1])
def test_with_a_budget_for_everything_it_is_hf(made, context):
    model, tokenizer = made
    asked = [(None, tiny.ids(1, context)[0].tolist(), tiny.ids(1, 6, seed=4)[0].tolist())]
    (want, _), = HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True)
    for budget in (4096, 12):
        with llmopt.attached(model, llmopt.kv.SnapKV(budget=budget, window=4)):
            (found, _), = LlmoptLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(asked,
                                                                                               disable_tqdm=True)
        assert (found == pytest.approx(want, rel=1e-5)) == (budget > 40 or context == 1)


@torch.no_grad()
def test_what_continuations_cost(made):
    model, _ = made
    context, rest = tiny.ids(1, 40), tiny.ids(1, 6, seed=4)
    want = cross_entropy(model(torch.cat([context, rest], 1)).logits[0, -7:-1], rest[0]).item()
    trials = [((llmopt.kv.KeyDiff(budget=budget), Record()),) for budget in (1000, 12)]
    dense, whole, less = costs(model, [Text(context, [(rest, 6)])], [(), *trials])
    assert dense.nats == pytest.approx(want, abs=1e-5) and whole.nats == pytest.approx(want, abs=1e-5)
    assert less.nats != pytest.approx(want, abs=1e-3)
