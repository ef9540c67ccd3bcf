"""prune.depth: scores by hand, what leaves, and the closed-form repair."""
import pytest
import torch

from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks, layer_list
from llmopt.prune import Depth
from llmopt.prune.influence import angular, bi, left_out
from llmopt.prune.refit import solve
from llmopt.prune.repair import repair
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny

CONTRACT = {"ratio": 0.34}
SCORES = ("damage", "mi", "bi", "angular")


def data(rows=8, length=24):
    ids = tiny.ids(rows, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]


def scaled(model, index, factor):
    for writer in (blocks(model)[index].attn_out, blocks(model)[index].ffn_out):
        writer.write(writer.weight * factor)
    return model


def whole(count):
    return [(index, "blocks") for index in range(count)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("factor", [0, 0.02])
def test_a_block_that_does_next_to_nothing_goes_first(score, factor):
    model = scaled(tiny.make("llama", num_hidden_layers=4), 2, factor)
    before = model(tiny.ids()).logits
    record = Depth(ratio=0.25, score=score, repair=False).apply(model, Run(data()))
    assert record.meta["removed"] == [[2, "blocks"]] and record.meta["removed_share"] == 0.25
    told = {index: value for index, _, value in record.meta["rounds"][0]}
    assert told[2] == min(told.values())
    if factor == 0:
        assert abs(told[2]) < 1e-7 and torch.equal(model(tiny.ids()).logits, before)
    assert [layer.self_attn.layer_idx for layer in layer_list(model)] == [0, 1, 2]


def test_scores_by_hand():
    model, run = tiny.make("llama"), Run(data())
    mi, turned = (left_out(model, run, [], whole(3), "mi", 10**6), bi(model, run, [], whole(3)))
    assert mi[2, "blocks"] == pytest.approx(turned[2, "blocks"], abs=1e-12)
    with torch.no_grad():
        found = [model(batch["input_ids"], output_hidden_states=True).hidden_states for batch in run.batches]
        before, behind, later = (torch.cat([hidden[i] for hidden in found]).double() for i in (0, 1, 2))
    cosine = torch.nn.functional.cosine_similarity
    assert turned[0, "blocks"] == pytest.approx(float(1 - cosine(before, behind, dim=-1).mean()))
    want = (cosine(before[:, -1], later[:, -1], dim=-1).arccos() / torch.pi).mean()
    assert angular(model, run, [0], 2)[0] == pytest.approx(float(want))


def test_the_influence_of_attention_and_ffn_is_from_before_each_to_behind_it():
    model, run = scaled(tiny.make("llama"), 1, 1), Run(data())
    blocks(model)[1].attn_out.write(torch.zeros(64, 64))
    found = bi(model, run, [], [(1, "attention"), (1, "mlp"), (1, "blocks")])
    assert found[1, "attention"] == pytest.approx(0, abs=1e-12)
    assert found[1, "mlp"] == pytest.approx(found[1, "blocks"]) and found[1, "mlp"] > 0.01


def test_each_round_measures_the_model_that_is_left():
    model = tiny.make("llama", num_hidden_layers=5)
    record = Depth(ratio=0.4, repair=False).apply(model, Run(data()))
    first, second = ({index: value for index, _, value in scores} for scores in record.meta["rounds"])
    one, two = (index for index, _ in record.meta["removed"])
    assert set(first) == {1, 2, 3} and set(second) == {1, 2, 3} - {one}
    fresh, run = tiny.make("llama", num_hidden_layers=5), Run(data())
    both = left_out(fresh, run, [(one, "blocks")], [(two, "blocks")], "damage", 1024)
    assert both[two, "blocks"] == pytest.approx(second[two]) and second[two] != pytest.approx(first[two])
    once = Depth(ratio=0.4, repair=False, iterative=False).apply(tiny.make("llama", num_hidden_layers=5), Run(data()))
    assert len(once.meta["rounds"]) == 1
    assert [index for index, _ in once.meta["removed"]] == sorted(first, key=first.get)[:2]


def test_attention_and_ffn_cost_what_they_weigh_and_a_block_without_both_is_gone():
    model = scaled(tiny.make("llama", num_hidden_layers=4), 1, 0)
    record = Depth(ratio=0.25, units=["attention", "mlp"]).apply(model, Run(data()))
    assert sorted(record.meta["removed"]) == [[1, "attention"], [1, "mlp"]]
    assert len(layer_list(model)) == 3 and model.config.num_hidden_layers == 3
    model = tiny.make("gpt_neox", num_hidden_layers=8)
    part = Depth(ratio=0.15, units=["mlp"], protect=False).apply(model, Run(data()))
    assert [layer["skip"] for layer in part.meta["layers"]].count(["mlp"]) == 1


@torch.no_grad()
def test_the_repair_solves_its_equation():
    model, run = tiny.make("llama"), Run(data(32))
    writer, seen = blocks(model)[0].ffn_out, []
    old = writer.weight.clone()
    handle = writer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    found = [model(batch["input_ids"], output_hidden_states=True).hidden_states for batch in run.batches]
    handle.remove()
    now, wanted = (torch.cat([hidden[i].flatten(0, 1) for hidden in found]) for i in (1, 2))
    plan = [LayerPlan(), LayerPlan(drop=True), LayerPlan()]
    figures, = repair(model, run, plan, "")
    assert figures["refit"] < figures["cut"]
    size = wanted.norm(dim=1, keepdim=True)
    x = torch.cat([torch.cat(seen), wanted - now], 1) / size
    want = solve(torch.cat([old, torch.eye(64)], 1), x.T @ x, torch.arange(96), figures["ridge"])
    torch.testing.assert_close(writer.weight, want.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_a_bias_can_say_is_said_in_full():
    """Block 1 of this GPT-2 adds a constant: the writer in front of it can add that as well."""
    def made():
        model = scaled(tiny.make("gpt2", num_hidden_layers=4), 1, 0)
        blocks(model)[1].ffn_out.bias.copy_(torch.linspace(-3, 3, 64))
        return model

    model, dense = made(), made()(tiny.ids()).logits
    plan = [LayerPlan(drop=index == 1) for index in range(4)]
    repair(model, Run(data(64)), plan, "")
    apply_plan(model, plan, Run())
    bare = made()
    apply_plan(bare, plan, Run())
    assert (model(tiny.ids()).logits - dense).norm() < 0.05 * (bare(tiny.ids()).logits - dense).norm()


@pytest.mark.parametrize(("family", "note"), [("gemma2", "a norm stands"), ("olmo2", "a norm stands"),
                                              ("mixtral", "experts")])
def test_where_no_writer_can_take_over_the_record_says_so(family, note):
    record = Depth(**CONTRACT).apply(tiny.make(family), Run(data()))
    assert note in record.meta["repair"][0]["note"] and record.meta["removed"] == [[1, "blocks"]]


def test_what_cannot_be_is_named():
    for units in (["ffn"], ["blocks", "mlp"], []):
        with pytest.raises(FieldError, match="units"):
            Depth(units=units)
    with pytest.raises(FieldError, match="angular is of whole blocks"):
        Depth(units=["mlp"], score="angular")
    with pytest.raises(BudgetError, match=r"less than one of the blocks \(0.333; nothing"):
        Depth(ratio=0.2).apply(tiny.make("llama"), Run(data()))
    with pytest.raises(BudgetError, match=r"at most 0.333 of the blocks may leave, as the first and the last"):
        Depth(ratio=0.7).apply(tiny.make("llama"), Run(data()))
    with pytest.raises(LlmoptError, match="cannot be pruned"):
        Depth(units=["mlp"]).apply(tiny.make("opt"), Run(data()))
    model = tiny.make("llama")
    record = Depth(ratio=0).apply(model, Run(data()))
    assert len(layer_list(model)) == 3 and record.meta["removed"] == []
