"""Solvers: named with their fields, preset by a step of their name, or for all weights of a block at once."""
import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

import llmopt
from llmopt.calibration.inputs import Moments
from llmopt.errors import FieldError
from llmopt.method import Run
from llmopt.parts import _REGISTRY, register
from llmopt.quant import GPTQ, RTN, Weights
from llmopt.quant.grid import encode, fit_groups
from llmopt.quant.solver import Solver
from llmopt.quant.tokens import TokenWeights
from tests.quant.quant_data import batches, logits
from tests.tiny import make

GIVEN = {"bits": 3, "group_size": 16}


def test_a_named_solver_does_what_the_step_of_its_name_does():
    for step, solver, run in ((RTN(**GIVEN), "rtn", Run()),
                              (GPTQ(act_order=False, damping=0.1, **GIVEN),
                               {"gptq": {"act_order": False, "damping": 0.1}}, Run(batches()))):
        one, two = make("llama"), make("llama")
        step.apply(one, run)
        Weights(solver=solver, **GIVEN).apply(two, run)
        assert torch.equal(logits(one), logits(two))
        assert not torch.equal(logits(one), logits(make("llama")))
    with pytest.raises(FieldError, match=r"solver\.gptq\.damping: 2"):
        Weights(solver={"gptq": {"damping": 2}})
    assert llmopt.get("quant.weights") is Weights and not Weights().needs_data and Weights(solver="gptq").needs_data


@dataclass(frozen=True)
class FirstTokens(TokenWeights):
    """Only the first tokens of each row count."""

    count: int = Field(8, ge=1)

    def weights(self, visit, run):
        place = [mask.cumsum(1)[mask] for mask in visit.masks]
        return [(p <= self.count).float() for p in place]


@dataclass(frozen=True)
class Learned(Solver):
    """Offsets of the rounding, found for all weights of a block together by the signs of their gradient."""

    inputs = "block"

    steps: int = Field(6, ge=1)

    def quantize_block(self, visit, specs, run):
        chosen = {p.name: p for p in visit.block.projections() if p.name in specs}
        offsets, losses = self.learn(visit, chosen, specs)
        for name, p in chosen.items():
            made = self.rounded(p.weight, offsets[name].detach(), specs[name])[1]
            made.figures = {"first": losses[0], "last": losses[-1]}
            yield p, made

    @torch.enable_grad()
    def learn(self, visit, chosen, specs):
        wanted = [out.detach() for out in visit.outputs()]
        offsets, losses = {name: torch.zeros_like(p.weight, requires_grad=True) for name, p in chosen.items()}, []
        for _ in range(self.steps):
            made = self.outputs(visit, chosen, offsets, specs)
            loss = sum((out - want).square().mean() for out, want in zip(made, wanted, strict=True))
            losses.append(loss.item())
            slopes = torch.autograd.grad(loss, list(offsets.values()))
            with torch.no_grad():
                for offset, slope in zip(offsets.values(), slopes, strict=True):
                    offset.sub_(0.03 * slope.sign()).clamp_(-0.5, 0.5)
        return offsets, losses

    def outputs(self, visit, chosen, offsets, specs):
        prefix = visit.block.name + "."
        weights = {p.name.removeprefix(prefix) + ".weight": self.rounded(p.weight, offsets[name], specs[name])[0]
                   for name, p in chosen.items()}
        return [visit.forward(i, weights) for i in range(len(visit.inputs))]

    def rounded(self, weight, offset, spec):
        """The weight that the codes stand for, with the gradient of the offset passed straight through; the codes."""
        scale, _ = fit_groups(weight, spec)
        grouped = (weight / scale.repeat_interleave(spec.group_size, 1)) + offset
        codes = encode(grouped.detach(), torch.ones(()), None, spec)
        made = llmopt.model.codes.Quantized(codes.to(torch.int8), scale, spec.bits, spec.group_size)
        value = made.dequantize(weight.dtype)
        return value + (grouped - grouped.detach()) * scale.repeat_interleave(spec.group_size, 1), made


@pytest.fixture(autouse=True)
def registered():
    register("first")(FirstTokens)
    register("learned")(Learned)
    yield
    del _REGISTRY["token weight"]["first"], _REGISTRY["solver"]["learned"]


def test_token_weights_decide_what_the_moments_are_made_of():
    """Tokens of weight 0 are as if they were not there: rows cut to 8 tokens give the same weights."""
    short = [{key: value[:, :8] for key, value in batch.items()} for batch in batches()]
    models = [make("llama", num_hidden_layers=1) for _ in range(3)]
    for model, data, tokens in zip(models, (batches(), short, batches()), ({"first": {"count": 8}}, "alike", "alike"),
                                   strict=True):
        GPTQ(tokens=tokens, act_order=False, search="weights", sweeps=0, **GIVEN).apply(model, Run(data))
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in models]
    alike = [float((weights[0] == other).float().mean()) for other in weights[1:]]
    assert alike[0] > 0.99 and alike[1] < 0.95              # some machines add up rows of another length differently


def test_a_solver_of_blocks_learns_through_the_block():
    model = make("llama")
    record = Weights(solver={"learned": {"steps": 8}}, **GIVEN).apply(model, Run(batches()))
    figures = list(record.meta["modules"].values())
    assert len(figures) == 3 * 7 and all(f["last"] < f["first"] for f in figures)
    assert record.meta["bits"] == 3 and not torch.equal(logits(model), logits(make("llama")))


def test_the_bits_of_a_solver_of_blocks_can_be_measured():
    step = Weights(solver={"learned": {"steps": 1}}, bits=3.5, group_size=16, allocate="sensitivity", widths=(3, 4))
    record = step.apply(make("llama", num_hidden_layers=1), Run(batches()))
    assert record.meta["bits"] <= 3.5 and {m["bits"] for m in record.meta["modules"].values()} == {3, 4}


@dataclass(frozen=True)
class FromRows(Solver):
    """Makes moments of the rows and leaves the rest to GPTQ."""

    inputs = "rows"

    def quantize(self, weight, seen, spec):
        moments = Moments()
        for rows in seen:
            moments.add(rows)
        moments.join(weight)
        return GPTQ(act_order=False).quantize(weight, moments, spec)


def test_a_solver_may_see_the_rows_behind_the_edited_groups():
    register("rows")(FromRows)
    try:
        one, two = make("llama"), make("llama")
        GPTQ(act_order=False, targets="weights", **GIVEN).apply(one, Run(batches()))
        Weights(solver="rows", **GIVEN).apply(two, Run(batches()))
        assert torch.equal(logits(one), logits(two))
    finally:
        del _REGISTRY["solver"]["rows"]


@pytest.mark.parametrize(("sees", "verb"), [("none", "quantize"), ("moments", "quantize"), ("block", "quantize_block")])
def test_a_solver_that_writes_nothing_is_refused_where_it_is_defined(sees, verb):
    with pytest.raises(TypeError, match=rf"Mute: a solver with inputs = '{sees}' writes {verb}$"):
        type("Mute", (Solver,), {"inputs": sees})
