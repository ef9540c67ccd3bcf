"""LoFiT: slopes of its scales by finite differences, one step of Adam by hand, what it finds in the reference model."""
import pytest
import torch

import llmopt
from llmopt.calibration.probes import load
from llmopt.heads import Lofit
from llmopt.heads.lofit import answer_loss, scaled
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny

CONTRACT = {"probes": 4, "length": 40, "epochs": 2}


def start(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [1e-3 * torch.randn(block.heads, block.head_dim, generator=generator) for block in blocks(model)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_step_goes_against_the_slope_of_the_answers_loss(family):
    """Adam's first step is the learning rate times the sign of the gradient, here by finite differences."""
    model, run = tiny.make(family, dtype=torch.float64), Run()
    Lofit(probes=2, length=24, epochs=1, rate=0.1, l1=0.0).apply(model, run)
    found, views, factors = load("tokens", 2, 24, 0, model.config, None), blocks(model), start(model)

    @torch.no_grad()
    def loss(layer, head, channel, shift):
        moved = [factor.clone().double() for factor in factors]
        moved[layer][head, channel] += shift
        with scaled(views, moved):
            return float(sum(answer_loss(model, probe) for probe in found))

    for layer, head in ((0, 1), (2, 3)):
        signs = torch.tensor([loss(layer, head, c, 1e-4) - loss(layer, head, c, -1e-4) for c in range(16)]).sign()
        expected = (factors[layer][head] - 0.1 * signs).norm()
        torch.testing.assert_close(run.scores["heads.lofit"][layer][head], expected, atol=1e-4, rtol=1e-3)


def test_the_penalty_alone_shrinks_every_scale_and_the_seed_draws_them():
    model, runs = tiny.make("llama"), [Run(), Run()]
    for seed, run in enumerate(runs):
        Lofit(probes=2, length=24, epochs=1, rate=1e-5, l1=1e6, seed=seed).apply(model, run)
    for layer, factor in zip(runs[0].scores["heads.lofit"], start(model), strict=True):
        torch.testing.assert_close(layer, (factor - 1e-5 * factor.sign()).norm(dim=1), atol=1e-7, rtol=1e-3)
    assert not torch.equal(runs[0].scores["heads.lofit"][0], runs[1].scores["heads.lofit"][0])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_scales_that_are_learned_answer_better():
    """With probes that the reference model has trouble with, the answers' loss falls."""
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    found, grown = load("world", 6, 200, 0, model.config, tokenizer), {}

    class Kept(Lofit):
        def _step(self, model, some, factors, steps):
            super()._step(model, some, factors, steps)
            grown["factors"] = [factor.detach().clone() for factor in factors]

    Kept(rate=0.05, epochs=4, batch=6).measure(model, Run(probes=found))
    with torch.no_grad():
        before = float(sum(answer_loss(model, probe) for probe in found))
        with scaled(blocks(model), grown["factors"]):
            after = float(sum(answer_loss(model, probe) for probe in found))
    assert after < .8 * before
