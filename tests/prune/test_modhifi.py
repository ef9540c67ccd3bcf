"""prune.modhifi: the identities of subset fidelity, and what the record tells."""
from itertools import combinations

import pytest
import torch

from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.prune import ModHiFi
from llmopt.prune.modhifi import explained, fidelity
from tests import tiny

CONTRACT = {"ratio": 0.5}
EACH = torch.arange(6)[:, None]             # six units of one column


def inputs(rows=64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=noise) @ torch.randn(6, 6, generator=noise), \
        torch.randn(5, 6, generator=noise)


def seen(x, **fields):
    found = ModHiFi(**fields).watch()
    for part in x.split(10):
        found.add(part)
    return found


def of(kept, x, weight):
    return fidelity(weight, x.double().T @ x.double(), torch.as_tensor(kept))


def test_fidelity_is_1_of_all_grows_along_any_chain_and_is_what_least_squares_explain():
    x, weight = inputs()
    y, before = x.double() @ weight.double().T, torch.zeros(5, dtype=torch.float64)
    for kept in ([4], [4, 1], [4, 1, 0], [4, 1, 0, 5], [4, 1, 0, 5, 3], range(6)):
        now = of([*kept], x, weight)
        rest = torch.linalg.lstsq(x[:, [*kept]].double(), y).solution
        left = (x[:, [*kept]].double() @ rest - y).square().sum(0)
        torch.testing.assert_close(now, 1 - left / y.square().sum(0), rtol=0, atol=2e-5)     # its ridge
        assert bool((now >= before - 1e-9).all()) and bool((now <= 1).all())
        before = now
    torch.testing.assert_close(before, torch.ones(5, dtype=torch.float64))


def test_of_one_channel_it_is_the_squared_cosine_and_scores_are_its_sums():
    x, weight = inputs()
    y = x.double() @ weight.double().T
    cosines = torch.nn.functional.cosine_similarity(y[:, None], x.double()[:, :, None], dim=0).square()  # [in, out]
    told, energy = explained(weight, x.double().T @ x.double(), EACH)
    torch.testing.assert_close(told / energy, cosines, rtol=0, atol=1e-8)
    torch.testing.assert_close(energy, y.square().sum(0))
    for fields, want in (({}, (cosines * energy).sum(1)), ({"aggregate": "mean"}, cosines.mean(1))):
        torch.testing.assert_close(ModHiFi(**fields).rate(weight, seen(x), EACH), want, rtol=1e-5, atol=1e-5)
    pairs = torch.tensor([[0, 3], [1, 2]])
    want = torch.stack([(of(pair, x, weight) * energy).sum() for pair in pairs])
    torch.testing.assert_close(ModHiFi().rate(weight, seen(x), pairs), want, rtol=1e-5, atol=1e-5)


def test_of_uncorrelated_channels_the_largest_are_the_best_of_all_subsets():
    x, _ = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    _, weight = inputs()
    x = x * torch.arange(1, 7)
    alone = torch.stack([of([i], x, weight) for i in range(6)])
    torch.testing.assert_close(of([0, 2, 5], x, weight), alone[[0, 2, 5]].sum(0))
    energy = (x @ weight.double().T).square().sum(0)
    best = max(combinations(range(6), 3), key=lambda kept: float((of([*kept], x, weight) * energy).sum()))
    assert {*best} == {*ModHiFi().rate(weight, seen(x), EACH).argsort()[3:].tolist()}


def test_scales_move_freely_and_dead_channels_count_nothing():
    x, weight = inputs()
    before = ModHiFi().rate(weight, seen(x), EACH)
    x[:, 2], weight[:, 2] = x[:, 2] * 8, weight[:, 2] / 8
    torch.testing.assert_close(ModHiFi().rate(weight, seen(x), EACH), before, rtol=1e-5, atol=1e-5)
    x[:, 4] = 0
    for fields in ({}, {"aggregate": "mean"}, {"center": True}):
        found = ModHiFi(**fields).rate(weight, seen(x, **fields), EACH)
        assert found[4] == 0 and bool((found.sort().values[1:] > 0).all())
    assert bool((of([4], x, weight) == 0).all()) and bool((of([0], x, weight * 0) == 1).all())


def test_centred_it_is_blind_to_what_is_constant():
    x, weight = inputs()
    centred, plain = seen(x - x.mean(0)), seen(x + 3, center=True)
    torch.testing.assert_close(plain.whole(), centred.whole(), rtol=1e-4, atol=1e-3)
    x[:, 1] = 50
    assert ModHiFi().rate(weight, seen(x), EACH).argmax() == 1
    found = ModHiFi(center=True).rate(weight, seen(x, center=True), EACH)
    assert found.argmin() == 1 and found[1] < 1e-4 * found.max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_record_tells_the_fidelity_of_what_stays(family):
    ids = tiny.ids(8, 24)
    run = Run(batches=[{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids.split(4)])
    read = {}
    model = tiny.make(family)
    model.requires_grad_(False)
    writers = {p: m for p, m in model.named_modules() if p.endswith(("down_proj", "mlp.c_proj"))}
    for name, module in writers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].flatten(0, 1)}))
    model(ids)
    dense = dict(read)
    weights = {name: m.weight.detach().clone() if family == "llama" else m.weight.detach().T.clone()
               for name, m in writers.items()}
    method = ModHiFi(ratio=0.5, units=["ffn"])
    plan, _ = method.plan(model, run)
    record = method.apply(model, run)
    assert [one["name"] for one in record.meta["fidelity"]] == [*weights]
    for layer, one in zip(plan, record.meta["fidelity"], strict=True):
        want = of(layer.ffn, dense[one["name"]], weights[one["name"]]).mean()
        assert one["fidelity"] == pytest.approx(float(want), abs=1e-5) and 0 < want < 1


def test_what_is_not_finite_is_named():
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    ids = tiny.ids(4, 24)
    with pytest.raises(LlmoptError, match="layers.1.mlp.down_proj: its units cannot be compared"):
        ModHiFi(units=["ffn"]).apply(model, Run(batches=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]))
