"""Candidates on plain tensors: what stays is fitted exactly, levels lie around the centre, the mean is a mean."""
import pytest
import torch

from llmopt.calibration.prefixes import Prefixes
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import OBS, Tyr, Wanda
from llmopt.prune.allocate import Units
from llmopt.prune.obs import damped_losses
from llmopt.prune.refit import solve
from llmopt.prune.supernet import Making, Option, Part, apart, mean, options, widths, written
from tests import tiny
from tests.prune.test_inputs import EACH, inputs, seen


def part(count, cost, levels=(0,), allowed=None):
    units = Units(0, "ffn", torch.linspace(1, 2, count), cost, allowed or tuple(range(count, 0, -1)),
                  torch.arange(count)[:, None])
    return Part(units, count, count * cost, tuple(levels))


def test_levels_lie_around_the_centre_and_reach_nothing():
    assert widths(part(80, 1), 10, 10, 2, False) == (0, 10, 20, 30)
    assert widths(part(80, 1), 10, 10, 2, True) == (0, 10, 20, 30, 80)
    assert widths(part(80, 1), 12, 10, 2, False) == (0, 12, 24, 36)             # stretched: 12 is one step from 0
    assert widths(part(80, 1), 1, 10, 1, False) == (0, 1, 11)                   # it would shrink too far
    assert widths(part(80, 1), 78, 10, 1, False) == (0, 68, 78, 79)             # one stays
    assert widths(part(80, 1, allowed=(80, 64, 48, 32)), 16, 8, 2, False) == (0, 16, 32)
    assert widths(part(3, 1), 0, 0.4, 2, True) == (0, 1, 2, 3)
    assert widths(Part(None, 1, 9), 0, 0.1, 2, True) == (0, 1)


def test_options_are_pairs_that_leave_something():
    own = {"attention": Part(None, 1, 9, (0, 1)), "mlp": part(4, 1, levels=(0, 2, 4))}
    assert options(own, False) == [(0, 0, False), (0, 2, False), (0, 4, False), (1, 0, False), (1, 2, False)]
    assert options(own, True)[-1] == Option(1, 4, True)
    assert own["mlp"].price(4) == 4 and own["attention"].price(1) == 9 and own["attention"].price(0) == 0
    assert apart(own, Option(1, 2), Option(1, 4, True)) and not apart(own, Option(0, 2), Option(1, 0))


def test_local_pruning_by_hand():
    x, weight = inputs(200)
    hessian = (x.T @ x).double()

    def lost(kept, ridge=1e-12):
        change = torch.zeros_like(weight).double()
        change[:, kept] = solve(weight, hessian, kept, ridge)
        return float(((change - weight) @ x.T.double()).square().sum())

    order = damped_losses(weight, hessian.clone(), EACH, 1e-4, rounds=6).argsort()
    kept = [order[n:].sort().values for n in range(6)]
    for some in kept[1:]:
        fitted = torch.linalg.lstsq(x[:, some].double(), (x @ weight.T).double()).solution.T
        torch.testing.assert_close(solve(weight, hessian, some, 1e-9), fitted, rtol=1e-4, atol=1e-4)
    losses = [lost(some) for some in kept]
    assert losses[0] < 1e-9 and losses == sorted(losses)            # all kept: as before; the fewer, the worse
    white = torch.eye(6, dtype=torch.float64) * 3
    norms = weight.square().sum(0)
    assert damped_losses(weight, white, EACH, 0.01, rounds=6).argsort().tolist() == norms.argsort().tolist()
    x[:, 4] = x[:, 1]
    twins = damped_losses(weight, (x.T @ x).double(), EACH, 1e-6, rounds=6)
    assert twins.argmin() in (1, 4) and twins.min() < 1e-4 * twins.max()


def test_first_order_adds_what_a_unit_writes_times_the_output():
    x, weight = inputs(200)
    hessian = (x.T @ x).double()
    plain, more = (damped_losses(weight, hessian.clone(), EACH, 0.01, rounds=1, first_order=first)
                   for first in (False, True))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    w = weight.double()
    torch.testing.assert_close(more - plain, (w @ damped * w).sum(0), rtol=1e-5, atol=1e-5)


def test_obs_and_wanda_rank_as_the_methods_do():
    block = blocks(tiny.make("llama"))[0]
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 96)
    hessian = (x.T @ x).double()
    for method, criterion in ((OBS(), "obs"), (Wanda(), "wanda")):
        found = Tyr(criterion=criterion).rank(1, block, block.ffn_out, "ffn", hessian).scores
        want = method.rate(block.ffn_out.weight, seen(method, x), torch.arange(96)[:, None]).float()
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def net(request):
    model = tiny.make(request.param, norms=True)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tiny.ids(16, 32).split(4)]
    units = ["ffn", "attention", "mlp"] + ["kv_groups"] * (request.param == "llama")
    step, run = Tyr(units=units, ratio=0.25), Run(batches=batches)
    ground = step._ground(model, run)
    parts, choices = ground.around(ground.uniform(), 0.25, 1)
    return model, run, step, parts, choices, Making(lambda *given: step.rank(1, *given), True).net(
        model, run, parts, choices, "net")


def test_what_is_in_place_is_what_stays_and_the_mean_is_weighted(net):
    model, _, _, parts, choices, found = net
    block, own = blocks(model)[1], parts[1]["mlp"]
    levels = own.levels
    assert levels[0] == 0 and levels[-1] == 96 and len(levels) > 3
    weight, bias = written(block, "mlp", own, levels[1], found.made[1])
    assert int((weight.abs().sum(0) > 0).sum()) == 96 - levels[1]
    assert written(block, "mlp", own, 96, found.made[1])[0].abs().sum() == 0
    assert torch.equal(written(block, "mlp", own, 0, {})[0], block.ffn_out.weight)
    many = [written(block, "mlp", own, taken, found.made[1]) for taken in levels]
    stay = torch.tensor([1 - taken / 96 for taken in levels])
    got = mean(block, "mlp", own, levels, found.made[1])
    torch.testing.assert_close(got[0], torch.einsum("e,eoi->oi", stay / stay.sum(), torch.stack([w for w, _ in many])))
    if bias is not None:
        torch.testing.assert_close(got[1], (stay[:, None] * torch.stack([b for _, b in many])).sum(0) / stay.sum())
    whole = parts[1]["attention"].count
    option = choices[1].index(Option(whole, levels[1]))
    plan = found.layer_plan(1, option)
    assert plan.skip == ("attention",) and len(plan.ffn) == 96 - levels[1]
    assert found.weights(block, len(choices[1]) - 1) is None        # both parts may leave, so the block may


def test_blocks_behind_read_what_the_candidates_write(net):
    """With the centre in front, the candidates of block 1 are fitted on what a block 0 cut to the centre writes."""
    model, run, step, parts, choices, _ = net
    centre = [Option(0, own["mlp"].levels[1]) for own in parts]
    made = Making(lambda *given: step.rank(1, *given), True, centre).net(model, run, parts, choices, "net")
    far = Making(lambda *given: step.rank(1, *given), True, [Option(0, 0)] * 3).net(model, run, parts, choices, "net")
    name = f"mlp.{parts[0]['mlp'].levels[1]}.columns"
    assert torch.equal(made.made[0][name], far.made[0][name])
    assert not torch.equal(made.made[1][name], far.made[1][name])
    centre = [Option(1, 0)] * 3
    behind = Making(lambda *given: step.rank(1, *given), True, centre).net(model, run, parts, choices, "net")
    assert not torch.equal(behind.made[0][name], far.made[0][name])         # an FFN, behind its own block's attention


def test_prefixes_of_nothing_taken_are_the_dense_model(net):
    model, run, _, _, choices, found = net
    rows = [{name: x[:1] for name, x in batch.items()} for batch in run.batches]
    prefixes = Prefixes(model, run, rows, 2048)
    cut = next(i for i, o in enumerate(choices[0]) if o.mlp and not o.attention)
    plain, less = prefixes.damage([(0, 0, 0), (cut, cut, cut)], range(4), found.weights)
    assert plain == 0 < less
