"""Solvers of whole blocks, tune and autoround: where they begin, what they come down to, whose tokens count."""
import dataclasses
import time

import pytest
import torch

from llmopt.calibration.walk import walk
from llmopt.errors import FieldError
from llmopt.method import Run
from llmopt.model.weights import check_consistent, coded
from llmopt.quant import GPTQ, RTN, AutoRound, Tune, Weights
from llmopt.quant.block_loss import BlockLoss
from llmopt.quant.deciding import decided
from llmopt.quant.latent import Gain, Held
from llmopt.quant.start import begin
from llmopt.quant.tune import split
from llmopt.transform import Rotate
from tests.quant.quant_data import batches, logits
from tests.tiny import make

CONTRACT = {"bits": 3, "group_size": 16, "iterations": 3}
GIVEN = {"bits": 2, "group_size": 16}


def made(step, family: str = "llama", **given):
    model = make(family, norms=True, **given)
    return model, step.apply(model, Run(batches()))


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_without_a_step_the_codes_are_those_it_begins_with(start):
    """The whole of quant.gptq is in the start: targets from the dense stream, groups behind groups, all figures."""
    plain = GPTQ(**GIVEN) if start == "gptq" else RTN(**GIVEN)
    want = logits(made(plain)[0])
    for step in (Tune(iterations=0, start=start, **GIVEN), AutoRound(iterations=0, start=start, **GIVEN)):
        model, record = made(step)
        assert torch.equal(logits(model), want)
        figures = record.meta["modules"]["model.layers.0.self_attn.q_proj"]
        assert figures["moved_codes"] == 0 and figures["block_error"] == figures["block_error_before"] > 0
        assert ("damping" in figures) == (start == "gptq")


@pytest.mark.parametrize("step", [Tune(iterations=12, codes=0.005, scales=0.005, **GIVEN),
                                  AutoRound(iterations=12, lr=0.03, **GIVEN)])
def test_a_block_comes_nearer_to_the_dense_one(step):
    model, record = made(step)
    figures = list(record.meta["modules"].values())
    assert all(f["block_error"] < 0.95 * f["block_error_before"] for f in figures[:7])
    assert any(f["moved_codes"] for f in figures) and all(f["block_error"] <= f["block_error_before"] for f in figures)
    check_consistent(model)
    assert torch.equal(logits(made(step)[0]), logits(model))                # the same steps, the same model


def test_tuning_moves_gains_and_autoround_leaves_them():
    plain = {name: p for name, p in make("llama", norms=True).named_parameters() if "norm" in name}
    tuned, rounded = (dict(made(step)[0].named_parameters()) for step in (Tune(iterations=8, codes=0, **GIVEN),
                                                                           AutoRound(iterations=4, **GIVEN)))
    assert all(torch.equal(rounded[name], p) for name, p in plain.items())
    assert {name for name, p in plain.items() if not torch.equal(tuned[name], p)} == \
        {name for name in plain if "layers" in name}


@pytest.mark.parametrize("weighed", [False, True])
def test_the_loss_is_that_of_the_real_tokens_as_they_count(weighed):
    model = make("llama", num_hidden_layers=1)
    visit, step = next(walk(model, batches())), Tune(**GIVEN)
    specs = {target.name: step.spec(target, torch.float32) for target in step.chosen(model)}
    latents = [Held(start) for start in begin(visit, specs, Run(batches()), RTN())]
    counts = [torch.rand(int(mask.sum())) if weighed else torch.ones(int(mask.sum())) for mask in visit.masks]
    loss = BlockLoss(visit, latents, [Gain(norm) for norm in visit.block.norms.values()], counts if weighed else None)

    def outputs():
        return [out[mask] * count.sqrt().unsqueeze(1)
                for out, mask, count in zip(visit.outputs(), visit.masks, counts, strict=True)]

    wanted = outputs()
    for latent in latents:
        latent.projection.write(latent.value())
    energy = sum(float(out.square().sum()) for out in wanted)
    for index, (a, b) in enumerate(zip(outputs(), wanted, strict=True)):
        assert loss(index).item() == pytest.approx(float((a - b).square().sum()) / energy, rel=1e-4)


@pytest.mark.parametrize("step", [cls(iterations=2, start="rtn", **GIVEN) for cls in (Tune, AutoRound)])
def test_tokens_that_count_less_change_what_is_learned(step):
    assert not torch.equal(logits(made(step)[0]), logits(made(dataclasses.replace(step, tokens="firstn"))[0]))


def test_predictions_come_nearer_to_the_dense_models():
    """The figure is the mean KL over the real tokens, of the model as it is left."""
    step = Tune(iterations=12, objective="logits", codes=0.02, **GIVEN)
    model, record = made(step)
    dense, figures = make("llama", norms=True), list(record.meta["modules"].values())
    p, q = (torch.cat([each(**b).logits[b["attention_mask"].bool()] for b in batches()]).log_softmax(-1).detach()
            for each in (dense, model))
    assert figures[0]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert figures[0]["kl"] < 0.95 * figures[0]["kl_before"] and {f["kl"] for f in figures} == {figures[0]["kl"]}
    assert step.needs_whole and not Tune().needs_whole and step.backward(2, 8) == 16 and Tune().backward(2, 8) == 0
    check_consistent(model)


def test_rotated_models_are_tuned_too():
    model = make("llama", norms=True)
    Rotate().apply(model, Run())
    record = Tune(iterations=8, codes=0, **GIVEN).apply(model, Run(batches()))
    assert all(f["block_error"] < f["block_error_before"] for f in list(record.meta["modules"].values())[:7])


def test_measuring_bits_leaves_the_model_as_it_was():
    """`sensitivity` tunes copies: the gains of a block move only where its codes are written."""
    model, dense = (make("llama", num_hidden_layers=1, norms=True) for _ in range(2))
    step = Tune(iterations=2, bits=3.5, group_size=16, allocate="sensitivity", widths=(3, 4))
    with torch.no_grad():
        decided(step, model, Run(batches()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    step.apply(model, Run(batches()))
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, dense.model.layers[0].input_layernorm.weight)


def test_minutes_end_it():
    model = make("llama", norms=True)
    began = time.monotonic()
    Tune(iterations=1_000_000, minutes=0.02, **GIVEN).apply(model, Run(batches()))
    assert time.monotonic() - began < 60 and coded(model)


def test_a_block_gets_its_part_of_the_minutes(monkeypatch):
    """Of a model that is cut to one block for a rehearsal, too."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    course = Tune(minutes=1.0)._course(Run(), 30)
    clock[0] = 1.9
    assert not course.late()
    clock[0] = 2.1
    assert course.late() and not Tune()._course(Run(), 30).late()


def test_every_eighth_batch_is_held_out():
    assert split(3) == ([0, 1, 2], [0, 1, 2]) and split(6) == ([1, 2, 3, 4, 5], [0])
    assert split(16)[1] == [0, 8] and len(split(16)[0]) == 14


def test_grids_of_floats_are_refused_and_integers_with_rounded_inputs_are_not():
    for cls in (Tune, AutoRound):
        with pytest.raises(FieldError, match="scheme: 'FP8_DYNAMIC'.*one of integers"):
            cls(scheme="FP8_DYNAMIC")
        cls(scheme="W8A8")
    with pytest.raises(FieldError, match="scheme"):
        Weights(scheme="MXFP4", solver="tune")
