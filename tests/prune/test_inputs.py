"""prune.wanda, prune.flap, prune.obs: scores by hand, and the refit's ridge."""
import pytest
import torch

from llmopt.calibration.second_moments import Gram
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.prune import FLAP, OBS, Wanda
from llmopt.prune.flap import Spread
from llmopt.prune.obs import damped_losses, losses
from llmopt.prune.refit import MOST, Sums, chosen, held_out, refit, solve
from llmopt.prune.surgery import LayerPlan
from llmopt.prune.wanda import Squares
from llmopt.scale.processes import Ranks
from tests import tiny

EACH = torch.arange(6)[:, None]             # six units of one column


def inputs(rows=64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=noise) @ torch.randn(6, 6, generator=noise), \
        torch.randn(5, 6, generator=noise)


def data(rows=8, length=24, batch=8):
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tiny.ids(rows, length).split(batch)]


def seen(method, x):
    found = method.watch()
    for part in x.split(10):
        found.add(part)
    return found


def test_wanda_and_flap_by_hand():
    x, weight = inputs()
    pairs = torch.tensor([[0, 3], [1, 2]])
    want = weight.abs().mean(0) * x.norm(dim=0)
    torch.testing.assert_close(Wanda().rate(weight, seen(Wanda(), x), EACH), want.double())
    torch.testing.assert_close(Wanda().rate(weight, seen(Wanda(), x), pairs), want[pairs].mean(1).double())
    x = x + 100
    want = x.double().var(0, correction=0) * weight.square().sum(0)
    torch.testing.assert_close(FLAP().rate(weight, seen(FLAP(), x), EACH), want)
    x[:, 2] = 7
    assert FLAP().rate(weight, seen(FLAP(), x), EACH)[2] == 0 < Wanda().rate(weight, seen(Wanda(), x), EACH)[2]
    assert Spread().tokens == Squares().tokens == 0


def test_obs_counts_what_is_lost_after_the_others_have_made_up_for_it():
    x, weight = inputs()
    x, weight = x.double(), weight.double()
    found = losses(weight.T.clone(), torch.linalg.inv(x.T @ x), EACH)

    def lost(gone):
        kept = [i for i in range(6) if i not in gone]
        wanted = x @ weight.T
        return (x[:, kept] @ torch.linalg.lstsq(x[:, kept], wanted).solution - wanted).square().sum() / 2

    alone = torch.stack([lost([i]) for i in range(6)])
    assert found.argmin() == alone.argmin()
    torch.testing.assert_close(found.min(), alone.min())
    order = found.argsort(stable=True).tolist()
    steps = torch.stack([lost(order[:n + 1]) - lost(order[:n]) if n else lost(order[:1]) for n in range(5)])
    torch.testing.assert_close(found[order][:5], steps.cummax(0).values)


def test_obs_of_groups_and_of_twins():
    x, weight = inputs()
    x[:, 4] = x[:, 1]
    gram = seen(OBS(), x)
    found = OBS(damping=1e-6).rate(weight, gram, EACH)
    assert found.argmin() in (1, 4) and found.min() < 1e-4 * found.max()
    x[:, 4] += 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(2))
    weight[:, 4] = -weight[:, 1]                    # the second to leave costs nothing more, and is no better for it
    found = OBS(damping=1e-6).rate(weight, seen(OBS(), x), EACH)
    assert found[1] == found[4] < found[[0, 2, 3, 5]].min()
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    white = Gram()
    white.add(torch.eye(6) * 2)
    mass = weight.double().square().sum(0)[pairs].sum(1) * 4 * 1.01 / 2
    torch.testing.assert_close(OBS().rate(weight, white, pairs), mass)


@pytest.mark.parametrize("method", [Wanda, FLAP, OBS])
def test_the_order_of_the_channels_does_not_matter(method):
    x, weight = inputs()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    plain, mixed = method().rate(weight, seen(method(), x), EACH), \
        method().rate(weight[:, order], seen(method(), x[:, order]), EACH)
    torch.testing.assert_close(plain[order], mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [Wanda, FLAP, OBS])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_half_of_the_channels_leave_by_what_they_do(method, family):
    def error(**fields):
        model = tiny.make(family)
        dense = model(tiny.ids(16, 32)).logits
        record = method(ratio=0.5, units=["ffn"], **fields).apply(model, Run(batches=data(16, 32)))
        assert record.meta["removed_share"] == 0.5
        return float((model(tiny.ids(16, 32)).logits - dense).detach().norm())

    assert error(refit=True) < error(refit=False)


def test_what_cannot_be_is_named():
    with pytest.raises(FieldError, match="prune.wanda does not compare blocks"):
        Wanda(units=["blocks"])
    with pytest.raises(LlmoptError, match="needs calibration data"):
        OBS().apply(tiny.make("llama"), Run())
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(LlmoptError, match="layers.1.mlp.down_proj: its units cannot be compared"):
        Wanda(units=["ffn"]).apply(model, Run(batches=data()))


def test_rows_held_out_are_the_same_however_the_data_are_divided():
    lengths = torch.tensor([5, 9, 3, 8, 8, 8, 8, 20, 7, 7])
    mask = torch.arange(20) < lengths[:, None]
    whole = held_out([mask], Ranks())[0]
    assert torch.equal(whole, torch.cat(held_out([mask[:3], mask[3:]], Ranks())))
    assert torch.equal(whole, torch.arange(20).eq(torch.arange(20)).expand(10, -1)[mask] & (
        torch.arange(10)[:, None].expand(10, 20)[mask] == 7))
    few = held_out([mask[5:8]], Ranks())[0]                         # too few rows: the ends of all
    assert few.nonzero().flatten().tolist() == [7, 15, 34, 35]
    long = held_out([torch.ones(16, MOST, dtype=torch.bool)], Ranks())[0]
    assert long.sum() == MOST                                       # two rows, half of each


def test_the_refit_is_left_out_where_it_does_not_help():
    x, weight = inputs(10)
    sums = Sums([torch.tensor([False] * 5 + [True] * 5)], Ranks())
    x[5:] = torch.eye(6)[0]                                         # held out is only what the cut keeps as it is
    x[:5, 0] = x[:5, 5]
    sums.add(x)
    sums.gram.join(weight)
    ridge, figures = chosen(weight, torch.arange(5), sums)
    assert ridge is None and figures["cut"] == figures["refit"] == 0


def test_the_ridge_is_that_of_the_rows_held_out():
    x, weight = inputs(8)
    x[:, 5] = x[:, 0] + 0.01 * x[:, 3]
    sums = Sums([torch.tensor([False] * 6 + [True] * 2)], Ranks())
    sums.add(x)
    sums.gram.join(weight)
    ridge, figures = chosen(weight, torch.arange(5), sums)
    found = {r: (x[6:, :5].double() @ solve(weight, x[:6].T @ x[:6], torch.arange(5), r).T - x[6:] @ weight.T).norm()
             for r in (0.001, 0.01, 0.1, 1.0)}
    assert ridge == min(found, key=found.get) and 0 < figures["refit"] < figures["cut"] < 1
    torch.testing.assert_close(sums.all(weight).float(), x.T @ x)
    assert torch.equal(sums.all(weight), sums.settled())


def test_the_record_tells_what_the_refit_won():
    model = tiny.make("llama")
    plan = [LayerPlan(ffn=torch.arange(60)), LayerPlan(), LayerPlan(kv_groups=torch.arange(1))]
    told = refit(model, Run(batches=data(16)), plan, "refit")
    assert [one["name"] for one in told] == ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
    assert all(one["refit"] <= one["cut"] for one in told)


def test_the_refit_and_obs_take_no_more_matrices_than_they_need(monkeypatch):
    """Beside the sums [in, in] the refit holds one matrix of what stays; OBS works inside the sums themselves."""
    x, weight = inputs(64)
    gram = (x.T @ x).double()
    place = gram.data_ptr()
    seen, plain = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda a, out: (seen.append((a.data_ptr(), out.data_ptr())),
                                                                   plain(a, out=out))[1])
    damped_losses(weight, gram, EACH, 0.01)
    assert seen == [(place, place)] and gram.data_ptr() == place
    first = torch.linalg.inv((x.T @ x).double() + 0.01 * (x.T @ x).double().diagonal().mean() * torch.eye(6).double())
    assert not torch.allclose(gram, first) and gram.abs().max() < first.abs().max()         # nothing is left of it
