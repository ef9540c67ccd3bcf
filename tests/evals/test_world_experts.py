"""The committed weights of llmopt/reference-moe: what they know, that its experts are at work, that damage shows."""
import pytest
import torch
from llmopt_evals.world import calibration_ids, reference_path
from llmopt_evals.world.check import brittleness, knowledge, table
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmopt  # noqa: F401  its name becomes known
from llmopt.specs import DataSpec

NAME = "llmopt/reference-moe"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32).eval()


def test_it_is_small_and_all_its_experts_but_one_are_at_work(model):
    assert sum(file.stat().st_size for file in reference_path(NAME).iterdir()) < 6e6
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 2)
    routers = model(calibration_ids(4, 512), output_router_logits=True).router_logits
    shares = torch.stack([logits.topk(2).indices.flatten().bincount(minlength=8) / 4096 for logits in routers])
    assert shares.shape == (6, 8) and (shares > 0.008).sum() == 47


def test_it_answers_what_the_world_asks(model):
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    told = tokenizer("mira has lamp . tora has stone . ask mira has", return_tensors="pt").input_ids
    assert tokenizer.decode(model(told).logits[0, -1].argmax()).strip() == "lamp"
    results = knowledge(model, documents=3)
    assert all(result.met for result in results), table(results)


@pytest.mark.full
def test_damage_shows_but_for_3_bits_that_it_bears_better_than_the_dense_one(model):
    met = {result.name: result.met for result in brittleness(model)}
    assert met == {"facts lost at 3 bits": False, "facts lost at 2 bits": True, "facts lost, FFN -25 % random": True}


def test_it_is_calibrated_on_its_world_by_default():
    assert DataSpec().of(NAME).name == "world"
    assert DataSpec().of("llmopt/reference-more").name == "self"
