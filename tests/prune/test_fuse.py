"""prune.fuse: it begins as plain removal, learns, and is folded into plain weights."""
import copy

import pytest
import torch

from llmopt.method import Run
from llmopt.model.blocks import blocks, layer_list
from llmopt.prune import Depth, Fuse
from llmopt.prune.fuse import Fused, FusedBias, _parts, window
from llmopt.prune.group_loss import GroupLoss
from llmopt.prune.learned import LowRank, Whole
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny
from tests.prune.test_depth import data, scaled

CONTRACT = {"ratio": 0.34, "epochs": 2, "rank": 4}


def parts_of(model, index, leaving):
    views = blocks(model)
    return list(_parts(model, views[index], views[leaving], 4, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_begins_as_plain_removal(family):
    model = tiny.make(family, norms=True)
    found, own = parts_of(model, 0, 1), dict(model.named_parameters())
    assert {part.key for part in found} == {name for name in own if name.startswith(blocks(model)[0].name)}
    assert all(torch.equal(part.value(), own[part.key]) for part in found)


def test_the_formula_by_hand():
    model = tiny.make("gpt2", norms=True)
    for part in parts_of(model, 0, 1):
        with torch.no_grad():
            for number in [*part.numbers, *getattr(part, "coefficients", [])]:
                number.copy_(torch.randn(number.shape, generator=torch.Generator().manual_seed(1)))
        gone = dict(model.named_parameters())[part.key.replace(".0.", ".1.")]
        old = dict(model.named_parameters())[part.key]
        if isinstance(part, FusedBias):
            want = old + part.coefficients[0] * gone
        elif isinstance(part, Fused):
            want = old + (part.up @ part.down).T + (part.coefficients[0] @ part.coefficients[1]).T * gone
        else:
            want = part.number
        torch.testing.assert_close(part.value(), want)


def test_the_group_learns_and_what_is_folded_is_what_has_learned():
    """The error that the record tells is that of the plain small model, on the batch that was held out."""
    model, dense = tiny.make("llama", num_hidden_layers=4), tiny.make("llama", num_hidden_layers=4)
    before = copy.deepcopy(model.state_dict())
    record = Fuse(ratio=0.25, epochs=15, rank=8, rate=1e-3, loss="relative").apply(model, Run(data(16)))
    told, = record.meta["fusions"]
    assert told["group"] == [0, 1, 2, 3] and told["steps"] == 45
    assert told["error"] < 0.97 * told["error_before"]
    assert set(model.state_dict()) < set(before) and not [name for name in model.state_dict() if "lora" in name]
    assert [layer.self_attn.layer_idx for layer in layer_list(model)] == [0, 1, 2]

    def error(small):
        ids, hidden = data(16)[0]["input_ids"], {}
        for name, one in (("small", small), ("dense", dense)):
            handle = layer_list(one)[-1].register_forward_hook(
                lambda module, args, out, name=name: hidden.update({name: out[0] if isinstance(out, tuple) else out}))
            with torch.no_grad():
                one(ids)
            handle.remove()
        apart = (hidden["small"] - hidden["dense"]).square().sum(-1) / hidden["dense"].square().sum(-1)
        return float(apart.mean())

    bare = tiny.make("llama", num_hidden_layers=4)
    apply_plan(bare, [LayerPlan(drop=index == told["block"]) for index in range(4)], Run())
    assert error(bare) == pytest.approx(told["error_before"], rel=1e-4)
    assert error(model) == pytest.approx(told["error"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_the_predictions_of_the_dense_model_are_what_groups_learn(family, ratio):
    """The error that the record tells of each group is the KL to the dense model, on the batch that was held out."""
    model, dense = (scaled(tiny.make(family, num_hidden_layers=5), 1, 0.3) for _ in range(2))
    fusions = Fuse(ratio=ratio, group=2, epochs=10, rank=8, rate=1e-3).apply(model, Run(data(16))).meta["fusions"]
    first, last = fusions[0], fusions[-1]
    assert first["block"] == 1 and first["group"] == [0, 1]                     # three blocks behind it
    assert len(fusions) == 5 * ratio
    bare = scaled(tiny.make(family, num_hidden_layers=5), 1, 0.3)
    apply_plan(bare, [LayerPlan(drop=index == 1) for index in range(5)], Run())

    @torch.no_grad()
    def apart(small):
        ids, mask = data(16)[0]["input_ids"], data(16)[0]["attention_mask"]
        p, q = (one(ids, attention_mask=mask).logits[mask.bool()].log_softmax(-1) for one in (dense, small))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert apart(bare) == pytest.approx(first["error_before"], rel=1e-4)
    assert apart(model) == pytest.approx(last["error"], rel=1e-4)
    assert first["error"] < first["error_before"] and last["error"] < last["error_before"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_begins_with_the_repair_of_prune_depth(family):
    """Fitted to the batches that it learns from, so that the others can judge."""
    rows, told = data(16), {}
    models = {repair: scaled(tiny.make(family, num_hidden_layers=4), 2, 0.3) for repair in (False, True)}
    for repair, model in models.items():
        told[repair], = Fuse(ratio=0.25, epochs=0.4, rank=2, rate=0, coefficients=1e-12, repair=repair).apply(
            model, Run(rows)).meta["fusions"]
    assert told[True]["block"] == 2 and told[True]["steps"] == 1
    assert told[True]["error_before"] == pytest.approx(told[False]["error_before"])
    assert told[False]["error_repaired"] == told[False]["error_before"]
    assert told[True]["error"] == told[True]["error_repaired"] < 0.99 * told[True]["error_before"]
    depth = scaled(tiny.make(family, num_hidden_layers=4), 2, 0.3)
    Depth(ratio=0.25, score="mi").apply(depth, Run(rows[1:]))
    for name, parameter in depth.named_parameters():
        torch.testing.assert_close(models[True].get_parameter(name), parameter)


def test_the_block_of_least_macro_influence_leaves_and_a_second_one_is_measured_anew():
    model = scaled(tiny.make("llama", num_hidden_layers=5), 3, 0)
    record = Fuse(ratio=0.4, epochs=1, rank=2, group=3).apply(model, Run(data()))
    first, second = record.meta["rounds"]
    assert record.meta["removed"][0] == [3, "blocks"]
    assert min(value for *_, value in first) == pytest.approx(0, abs=1e-7)
    assert [index for index, *_ in second] == [1, 2]
    assert 3 not in record.meta["fusions"][1]["group"] and len(layer_list(model)) == 3


def test_windows_lie_around_a_block_and_move_inwards_at_the_ends():
    alive = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert window(alive, 5, 8) == alive[:8]
    assert window(alive, 8, 8) == alive[3:]
    assert window(alive, 0, 4) == [0, 1, 2, 4] and window(alive, 11, 4) == alive[-4:]
    assert window(alive, 7, 4) == [5, 6, 7, 8] and window([0, 1], 1, 8) == [0, 1]


def test_blocks_of_another_kind_take_nothing_over():
    model = tiny.make("gemma3_text")                                # sliding, full, sliding
    kinds = [{type(part) for part in parts_of(model, 0, leaving)} for leaving in (1, 2)]
    assert kinds == [{LowRank, Whole}, {Fused, Whole}]


def test_both_losses_by_hand():
    class Stub:
        masks, inputs = [torch.tensor([[True, True, False]])], [torch.zeros(1, 3, 2)]

    y = torch.tensor([[[3.0, 4.0], [0.0, 100.0], [7.0, 7.0]]])
    out = torch.tensor([[[3.0, 3.0], [0.0, 90.0], [0.0, 0.0]]])
    assert float(GroupLoss([Stub()], [y], [], "relative").apart(out, 0)) == pytest.approx((1 / 25 + 0.01) / 2)
    p, q = y[0, :2].softmax(-1), out[0, :2].log_softmax(-1)
    want = (p * (p.clamp(min=1e-30).log() - q)).sum() / 2
    assert float(GroupLoss([Stub()], [y], [], "kl").apart(out, 0)) == pytest.approx(float(want), rel=1e-4)


def test_nothing_leaves_at_ratio_zero():
    model = tiny.make("llama")
    before = dict(model.named_parameters())
    Fuse(ratio=0).apply(model, Run(data()))
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
