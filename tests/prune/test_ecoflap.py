"""scope: ecoflap. Ratios by hand, and scores against slopes."""
import math

import pytest
import torch

from llmopt.errors import FieldError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Magnitude, Wanda
from llmopt.prune.allocate import rounded
from llmopt.prune.ecoflap import ECoFLaP, Groups, first, kept, root_mean_square, shifted
from llmopt.prune.scopes import Demand
from tests import tiny
from tests.prune.test_inputs import data
from tests.prune.test_scopes import units


def floors(sizes, cap):
    return [math.ceil(size * (1 - cap)) for size in sizes]


def ratios(scores, sizes, p, cap):
    keep = kept(scores, sizes, floors(sizes, cap), round(sum(sizes) * (1 - p)))
    assert sum(keep) == round(sum(sizes) * (1 - p))
    assert all(1 - cap <= k / size <= 1 for k, size in zip(keep, sizes, strict=True))
    return [1 - k / size for k, size in zip(keep, sizes, strict=True)]


def test_ratios_are_exact_within_the_window_and_rise_with_the_score():
    sizes = [1000, 1000, 1000, 1000]
    assert ratios([2.0, 2.0, 2.0, 2.0], sizes, 0.5, 0.6) == [0.5] * 4
    assert ratios([1.0, 2.0, 3.0, 4.0], sizes, 0.5, 0.6) == pytest.approx([0.56, 0.52, 0.48, 0.44])     # .6 - .4 share
    assert ratios([1e9, 1.0, 1.0, 1.0], sizes, 0.5, 0.7) == pytest.approx([0, 2 / 3, 2 / 3, 2 / 3], abs=1e-3)
    assert ratios([0.0] * 4, sizes, 0.5, 0.7) == [0.5] * 4
    assert ratios([5.0, 1.0, 0.0, 2.0], sizes, 0.0, 0.1) == [0.0] * 4
    assert ratios([5.0, 1.0, 0.0, 2.0], sizes, 0.5, 0.5) == [0.5] * 4
    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        some = torch.randint(3, 500, (6,), generator=noise).tolist()
        scores = torch.rand(6, generator=noise).square().tolist()
        found = ratios(scores, some, 0.4, 0.6)
        assert ratios([7 * s for s in scores], some, 0.4, 0.6) == found
        alike = ratios(scores, [300] * 6, 0.4, 0.6)
        assert [alike[i] for i in sorted(range(6), key=lambda i: scores[i])] == sorted(alike, reverse=True)


def test_shares_become_whole_units_and_never_more_than_the_ratio():
    found = [units(n, [0.0] * 10, cost=cost, counts=(10, 8, 6, 4)) for n, cost in enumerate((1, 1, 1))]
    assert rounded(found, [3.9, 2.0, 3.1], 0.3) == [4, 2, 2]            # the nearest to its next number
    assert rounded(found, [3.9, 2.0, 3.9], 0.33) == [4, 2, 2]
    assert rounded(found, [6.0, 0.0, 0.0], 0.2) == [6, 0, 0]


def demand(model, **fields):
    method = Magnitude(ratio=0.25, refit=False)
    rated = [{kind: values.detach() for kind, values in method.score(block, None).items()} for block in blocks(model)]
    some = [u for block, scores in zip(blocks(model), rated, strict=True) for u in method._units(block, scores, 1)]
    return Demand(some, 0.25, "lamp", False, model, Run(batches=data(4, batch=2)), "test")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_slopes_of_the_loss(family):
    """Zeroth order along a draw is |<z, dL/dW>|, first order the sum of |dL/dW|; no weight has changed."""
    model = tiny.make(family, dtype=torch.float64)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    wanted, rows = demand(model), [dict(batch) for batch in data(2, batch=1)]
    groups = Groups(wanted, False)
    names = groups.moved(False)
    found = ECoFLaP(by="tensor", epsilon=3e-3)._drawn(wanted, names, rows, draw=3)
    slopes = first(wanted, groups)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    block = blocks(model)[1]
    for p in (block.ffn_out, block.attn_in[0]):
        parameter = getattr(p.module, p.parameter).requires_grad_()

        def slope(batches, parameter=parameter, p=p):
            loss = sum(model(batch["input_ids"], labels=batch["input_ids"]).loss * len(batch["input_ids"])
                       for batch in batches)
            there = torch.autograd.grad(loss, parameter)[0]
            return there.T if p.transposed else there

        z = shifted(p, 1.0, "0 3") - p.weight
        assert found[(p.name,)] == pytest.approx(abs(float((z * slope(rows)).sum())) / len(rows), rel=5e-3)
        want = sum(float(slope([batch]).abs().sum()) for batch in wanted.run.batches)
        assert slopes[(p.name,)] == pytest.approx(want, rel=1e-4)


def test_draws_are_normal_and_hang_on_name_and_seed_alone():
    one, other = (blocks(tiny.make("llama"))[n].attn_out for n in (0, 1))
    z = torch.stack([shifted(one, 1.0, str(n)) - one.weight for n in range(1500)])
    assert (z[:, 0, :8] @ torch.ones(8)).abs().mean() == pytest.approx(math.sqrt(2 / math.pi * 8), rel=0.06)
    assert torch.equal(shifted(one, 1.0, "a"), shifted(one, 1.0, "a"))
    assert not torch.equal(shifted(one, 1.0, "a") - one.weight, shifted(other, 1.0, "a") - other.weight)
    torch.testing.assert_close(shifted(one, 0.5, "a") + shifted(one, -0.5, "a"), 2 * one.weight)
    assert root_mean_square([one]) == pytest.approx(float(one.weight.square().mean().sqrt()))


@pytest.mark.parametrize(("order", "by"), [("zeroth", "block"), ("zeroth", "tensor"), ("first", "tensor")])
def test_the_budget_and_the_window_are_kept(order, by):
    model = tiny.make("qwen3", norms=True)
    scope = {"ecoflap": {"order": order, "by": by, "draws": 2, "trial_tokens": 48}}
    told = Magnitude(ratio=0.3, scope=scope, units=["ffn"], refit=False).apply(model, Run(batches=data(2))).meta
    assert 0.29 < told["removed_share"] <= 0.3 and len(told["scores"]) == 3 and min(told["scores"]) > 0
    assert max(told["leaves"]) <= 0.4 and len(set(told["leaves"])) > 1


def test_a_cap_below_the_ratio_is_refused():
    with pytest.raises(FieldError, match="at least the ratio, 0.3"):
        Wanda(ratio=0.3, scope={"ecoflap": {"cap": 0.2}})
