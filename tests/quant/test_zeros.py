"""Zeros of pruned weights through every solver: they stay, and what would fill them goes to entries that live."""
import pytest
import torch

import llmopt
from llmopt.calibration.inputs import Moments
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.forms import FORMS
from llmopt.model.weights import Projection
from llmopt.prune import Wanda
from llmopt.quant import GPTQ, HQQ, RTN, AutoRound, Tune, making
from llmopt.quant.grid import Spec
from llmopt.quant.latent import Following, Held
from llmopt.quant.start import _solved
from llmopt.quant.zeros import live
from llmopt.transform import Rotate
from tests.quant.quant_data import batches
from tests.quant.test_gptq import PLAIN, correlated
from tests.tiny import make


def masked(out: int = 12, columns: int = 24):
    """A weight, two of every four entries of which are 0, the Moments of correlated inputs, and where it lives."""
    weight, stats, _ = correlated(out, columns)
    scores = torch.rand(out, columns, generator=torch.Generator().manual_seed(3)).unflatten(1, (-1, 4))
    alive = (scores.argsort(-1).argsort(-1) >= 2).flatten(1)
    return weight * alive, stats, alive


def test_a_mask_is_told_by_two_fifths_of_the_weight():
    weight = torch.ones(10, 40)
    assert live(weight, "auto") is None and live(weight, True) is None
    weight[:, :16] = 0
    assert live(weight, "auto").sum() == 240 and live(weight, False) is None
    weight[0, 0] = 1
    assert live(weight, "auto") is None and live(weight, True).sum() == 241


@pytest.mark.parametrize("fields", [{}, {"act_order": False}, {"static_groups": False}, {"sweeps": 0}, PLAIN])
@pytest.mark.parametrize("spec", [
    dict(bits=3, group_size=8), dict(bits=2, group_size=-1, symmetric=False),
    dict(bits=4, group_size=4, symmetric=False), dict(bits=8, form=FORMS["fp8"]),
    dict(bits=4, group_size=8, dtype=torch.bfloat16)])
def test_gptq_leaves_zeros_and_loses_less_than_the_nearest(fields, spec):
    weight, stats, alive = masked()
    spec = Spec(clip=True, **spec, live=alive)
    made = GPTQ(**fields).quantize(weight.clone(), stats, spec)
    values = made.dequantize(spec.dtype).float()
    assert not values[~alive].any() and values[alive].count_nonzero() > alive.sum() / 3
    rounded = RTN().quantize(weight.clone(), None, spec).dequantize(spec.dtype).float()
    assert made.figures["loss"] < sum((row - w) @ stats.hessian @ (row - w) for row, w in
                                      zip(rounded, weight, strict=True)) / 2


def test_equals_brute_force_in_which_entries_that_do_not_live_become_zero():
    weight, stats, alive = masked()
    spec = Spec(4, live=alive)
    made = GPTQ(act_order=False, damping=0.0, **PLAIN).quantize(weight.clone(), stats, spec)
    w, q, scale = weight.double().clone(), torch.zeros(12, 24, dtype=torch.float64), made.scales[:, 0].double()
    for i in range(24):
        inverse = torch.linalg.inv(stats.hessian[i:, i:].double())
        q[:, i] = (w[:, i] / scale).round().clamp(-8, 7) * scale * alive[:, i]
        w[:, i:] -= ((w[:, i] - q[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    kept = (made.dequantize(torch.float32) - q.float()).abs().amax(1) < 1e-6
    assert kept.sum() == 12 - made.figures["rounded_rows"] >= 6


def test_at_many_bits_what_lives_makes_up_for_all_that_is_asked_for():
    """Asked for a whole weight, its live entries come to w H_:L H_LL^-1: least squares over the entries that live."""
    _, _, alive = masked()
    whole, stats, x = correlated()
    stats.hessian.diagonal().add_(0.3 * stats.hessian.diagonal().mean())         # so that few turns come to the end
    made = GPTQ(sweeps=40, clip=False).quantize(whole.clone(), stats, Spec(8, 8, live=alive)).dequantize(torch.float32)
    for row, wanted, found in zip(whole, alive, made, strict=True):
        best = torch.linalg.solve(stats.hessian[wanted][:, wanted], (row @ stats.hessian)[wanted])
        assert (found[wanted] - best).abs().max() < 0.03 * best.abs().max() and not found[~wanted].any()
        assert (row[wanted] - best).abs().max() > 0.1 * best.abs().max()


STEPS = {"rtn": RTN(symmetric=False, bits=3, group_size=16), "hqq": HQQ(bits=3, group_size=16),
         "gptq": GPTQ(bits=3, group_size=16), "floats": GPTQ(scheme="FP8_DYNAMIC"),
         "autoround": AutoRound(bits=3, group_size=16, iterations=4, lr=0.4, start="gptq"),
         "tune": Tune(bits=3, group_size=16, iterations=4, objective="logits", codes=0.5)}


@pytest.mark.parametrize("name", STEPS)
def test_a_pattern_outlives_every_solver(name):
    model, data = make("llama"), batches()
    prune = Wanda(ratio=0.5, units=["weights"], pattern="2:4")
    report = llmopt.compress(model, [prune, STEPS[name]], batches=data)
    weights = [p.weight for block in blocks(model) for p in block.projections()]
    assert all(((of == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all() for of in weights)
    meta = report.records[1]["meta"]
    assert meta["notes"] == ["zeros of 21 weights stay zeros (50.0% of these)"]
    told = meta["modules"]["model.layers.1.mlp.down_proj"]
    assert told["zeros"] == 64 * 96 / 2 and told["bits"] == STEPS[name].bits


@pytest.mark.parametrize("name", ["rtn", "autoround"])
def test_a_weight_is_asked_for_its_mask_once(name, monkeypatch):
    asked = []
    monkeypatch.setattr(making, "live", lambda weight, keep: asked.append(weight) or live(weight, keep))
    STEPS[name].apply(make("llama", num_hidden_layers=1), Run(batches()))
    assert len(asked) == 7


@pytest.mark.parametrize("kind", [Held, Following])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_learned_moves_no_code_of_theirs(kind, symmetric):
    weight, stats, alive = masked()
    projection = Projection("x", torch.nn.Linear(24, 12))
    projection.write(weight)
    start = _solved(projection, Spec(3, 8, symmetric, live=alive), stats, GPTQ())
    latent = kind(start)
    latent.offset.fill_(0.75).requires_grad_()
    made = latent.result().dequantize(torch.float32)
    assert not start.slack[~alive].any() and start.slack[alive].any() and not made[~alive].any()
    assert (made != start.codes.dequantize(torch.float32))[alive].float().mean() > 0.3


def test_what_goes_on_with_all_blocks_knows_where_zeros_were(monkeypatch):
    seen = {}
    monkeypatch.setattr(Tune, "finish", lambda self, model, specs, run, prepared: seen.update(specs))
    prune = Wanda(ratio=0.5, units=["weights"], pattern="2:4")
    llmopt.compress(make("llama"), [prune, STEPS["tune"]], batches=batches())
    assert len(seen) == 21 and all(spec.live.sum() == spec.live.numel() // 2 for spec in seen.values())


def test_the_solver_fills_them_where_it_is_told_to():
    model = make("llama")
    prune = Wanda(ratio=0.5, units=["weights"], pattern="2:4", refit=False)
    step = GPTQ(bits=4, group_size=16, keep_zeros=False)
    report = llmopt.compress(model, [prune, step], batches=batches())
    assert any(((p.weight == 0).unflatten(1, (-1, 4)).sum(-1) < 2).any() for p in blocks(model)[1].projections())
    assert "notes" not in report.records[1]["meta"]
    assert "quant.gptq will fill zeros again" in report.records[0]["meta"]["notes"][-1]
    assert not any("fill" in note for note in prune.notes(Run(ahead=(GPTQ(), RTN(keep_zeros=False)))))
    thin = Wanda(ratio=0.3, units=["weights"], refit=False)
    assert "quant.gptq will fill zeros again" in thin.notes(Run(ahead=(GPTQ(), RTN())))[-1]
    assert not any("fill" in note for note in thin.notes(Run(ahead=(GPTQ(keep_zeros=True),))))


def test_rows_are_solved_alike_by_several_processes():
    weight, stats, alive = masked()
    whole = GPTQ().quantize(weight.clone(), stats, Spec(3, 8, live=alive))
    part = GPTQ().quantize(weight[5:].clone(), stats, Spec(3, 8, live=alive[5:]))
    assert torch.equal(whole.codes[5:], part.codes)


def test_a_rotation_says_what_it_fills(caplog):
    model = make("llama")
    report = llmopt.compress(model, [Wanda(ratio=0.5, units=["weights"], refit=False), Rotate()], batches=batches())
    (note,) = report.records[1]["meta"]["notes"]
    sizes = sum(p.weight.numel() for block in blocks(model) for p in block.projections())
    assert note.startswith(f"{sizes // 2:,} weights that were exactly 0 are not any more") and note in caplog.text
    assert "transform.rotate will fill" in report.records[0]["meta"]["notes"][-1]
    assert "notes" not in llmopt.compress(make("llama"), [Rotate()]).records[0]["meta"]


def test_a_rotation_of_heads_counts_what_it_fills_alone():
    model = make("llama", seed=1)
    for block in blocks(model):
        for p in block.projections():
            p.weight[:, ::2] = 0
    (note,) = Rotate(stream=False).apply(model, Run()).meta["notes"]
    assert note.startswith(f"{3 * 64 * 64 // 2:,} weights")                              # o_proj's; of v rows are mixed


def test_moments_of_no_use_round_and_keep_them():
    weight, _, alive = masked()
    stats = Moments()
    stats.lower, stats.tokens = torch.full((24, 24), -1.0).double(), 2                  # no second moments of anything
    made = GPTQ().quantize(weight.clone(), stats, Spec(4, live=alive))
    assert "singular" in made.figures["note"] and not made.codes[~alive].any()
