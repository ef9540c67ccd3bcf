"""Cutting: the small model equals the dense one with the same units zeroed; config, scores and caches follow."""
import pytest
import torch

from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.shapes import shapes
from llmopt.prune.groups import cost, members
from llmopt.prune.surgery import LayerPlan, apply_plan, head_columns
from tests import tiny

HEADS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
ALL = (*HEADS, "olmo2", "gpt_neox", "gpt2", "opt")


def model_of(family, **changes):
    """Eight query heads in four KV groups, where heads can be pruned at all."""
    if family in HEADS:
        changes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return tiny.make(family, **changes)


@torch.no_grad()
def mask(model, plan):
    """Zero in the dense model what the plan cuts: the writers' columns of lost units, the outputs of lost parts."""
    for block, layer in zip(blocks(model), plan, strict=True):
        for writer in [w for part, w in (("attention", block.attn_out), ("mlp", block.ffn_out)) if part in layer.skip]:
            writer.write(torch.zeros_like(writer.weight))
            if writer.bias is not None:
                writer.bias.zero_()
        if layer.ffn is not None:
            _zero_others(block.ffn_out, layer.ffn)
        if layer.heads is not None or layer.kv_groups is not None:
            _zero_others(block.attn_out, head_columns(layer.kept_heads(block), block.head_dim))


def _zero_others(writer, kept):
    gone = torch.ones(writer.in_features, dtype=torch.bool)
    gone[kept] = False
    writer.weight[:, gone] = 0


def pick(total, *gone):
    return torch.tensor([i for i in range(total) if i not in gone])


@torch.no_grad()
def assert_sliced_equals_masked(family, plan, **changes):
    sliced, masked = model_of(family, **changes), model_of(family, **changes)
    apply_plan(sliced, plan, Run())
    mask(masked, plan)
    ids = tiny.ids()
    expected, found = masked(ids).logits, sliced(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    assert not torch.allclose(expected, model_of(family, **changes)(ids).logits, atol=1e-2), "the plan did not matter"
    left = torch.ones_like(ids)
    left[1, :7] = 0
    texts = [m.generate(ids, attention_mask=left, max_new_tokens=6, do_sample=False, eos_token_id=None)
             for m in (sliced, masked)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ALL)
def test_ffn_channels_layer_by_layer(family):
    assert_sliced_equals_masked(family, [LayerPlan(ffn=pick(96, 0, 5, 95)), LayerPlan(), LayerPlan(ffn=pick(96, 17))])


@pytest.mark.parametrize("family", [f for f in HEADS if f != "phi3"])
def test_kv_groups_and_heads_layer_by_layer(family):
    plan = [LayerPlan(kv_groups=pick(4, 1)), LayerPlan(heads=torch.tensor([1, 2, 4, 7])), LayerPlan(ffn=pick(96, 3))]
    assert_sliced_equals_masked(family, plan)


@pytest.mark.parametrize("family", HEADS)
def test_kv_groups_alike_in_all_layers(family):
    assert_sliced_equals_masked(family, [LayerPlan(kv_groups=pick(4, i)) for i in range(3)])


@pytest.mark.parametrize("family", ALL)
def test_skipped_attention_of_the_first_layer(family):
    assert_sliced_equals_masked(family, [LayerPlan(skip=("attention",)), LayerPlan(), LayerPlan(ffn=pick(96, 3))])


@pytest.mark.parametrize("family", [f for f in ALL if f != "opt"])
def test_skipped_feed_forward(family):
    assert_sliced_equals_masked(family, [LayerPlan(), LayerPlan(skip=("mlp",)), LayerPlan()])


@pytest.mark.parametrize(("family", "changes"), [("opt", {"do_layer_norm_before": False}),
                                                 ("gpt_neox", {"use_parallel_residual": False})])
def test_the_other_residual_forms(family, changes):
    plan = [LayerPlan(skip=("attention",)), LayerPlan(ffn=pick(96, 9)), LayerPlan(ffn=pick(96, 2))]
    assert_sliced_equals_masked(family, plan, **changes)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_skipped_parts_with_a_static_cache(family):
    model = model_of(family)
    apply_plan(model, [LayerPlan(skip=("attention",)), LayerPlan(skip=("mlp",)), LayerPlan(ffn=pick(96, 9))], Run())
    texts = [model.generate(tiny.ids(2, 20), max_new_tokens=8, do_sample=False, eos_token_id=None, **kind)
             for kind in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_a_dropped_block_is_as_if_it_never_was(family):
    model = model_of(family)
    ids = tiny.ids()
    kept = [block.module for i, block in enumerate(blocks(model)) if i != 1]
    expected = model_of(family)
    mask(expected, [LayerPlan(), LayerPlan(skip=("attention", "mlp")), LayerPlan()])
    apply_plan(model, [LayerPlan(), LayerPlan(drop=True), LayerPlan()], Run())
    assert [block.module for block in blocks(model)] == kept
    assert model.config.num_hidden_layers == 2
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == ids.shape[1] + 3


def test_cuts_add_up_over_steps():
    model = model_of("llama")
    apply_plan(model, [LayerPlan(kv_groups=pick(4, 0))] * 3, Run())
    apply_plan(model, [LayerPlan(kv_groups=pick(3, 2), ffn=pick(96, 1))] * 3, Run())
    assert model.config.num_attention_heads == 4
    assert model.config.num_key_value_heads == 2
    assert model.config.intermediate_size == 95
    assert not model.config.is_heterogeneous


def test_scores_follow_the_heads_that_remain():
    model = model_of("llama")
    run = Run(scores={"heads.x": [torch.arange(8.) + 10 * layer for layer in range(3)]})
    apply_plan(model, [LayerPlan(kv_groups=pick(4, 1)), LayerPlan(drop=True), LayerPlan(skip=("attention",))], run)
    assert [s.tolist() for s in run.scores["heads.x"]] == [[0, 1, 4, 5, 6, 7], []]
    assert [len(s) for s in run.scores["heads.x"]] == [shape.heads for shape in shapes(model)]


@pytest.mark.parametrize(("family", "plan", "fact"), [
    ("phi3", [LayerPlan(kv_groups=pick(4, 0)), LayerPlan(), LayerPlan()], "per_layer_heads"),
    ("mixtral", [LayerPlan(skip=("attention",)), LayerPlan(), LayerPlan()], "alike"),
    ("llama", [LayerPlan(skip=("attention",))] * 3, "no layer with attention"),
])
def test_what_cannot_be_stored_is_refused_before_anything_changes(family, plan, fact):
    model = model_of(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LlmoptError, match=fact):
        apply_plan(model, plan, Run())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_blocks_that_know_their_number_stay():
    model = tiny.make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(LlmoptError, match="layer's number"):
        apply_plan(model, [LayerPlan(drop=True), LayerPlan(), LayerPlan()], Run())


def test_costs_count_the_parameters_that_leave():
    for family, unit, plan in (("qwen2", "kv_groups", LayerPlan(kv_groups=pick(4, 2))),
                               ("gpt2", "ffn", LayerPlan(ffn=pick(96, 2))), ("phi3", "ffn", LayerPlan(ffn=pick(96, 2))),
                               ("opt", "attention", LayerPlan(skip=("attention",)))):
        model = model_of(family)
        before, price = model.num_parameters(), cost(blocks(model)[0], unit)
        apply_plan(model, [plan] * 2 + [plan if unit != "attention" else LayerPlan()], Run())
        assert before - model.num_parameters() == price * (3 if unit != "attention" else 2)


def test_members_of_a_kv_group_are_the_rows_of_its_heads():
    block = blocks(model_of("llama"))[0]
    q, k, v, out = members(block, "kv_groups")
    assert q.index[1].tolist() == list(range(16, 32))
    assert k.index[1].tolist() == v.index[1].tolist() == list(range(8, 16))
    assert out.columns and out.index[1].tolist() == list(range(16, 32))


@pytest.mark.parametrize(("plan", "fact"), [
    ([LayerPlan()] * 2, "the plan is for another model: it has 2 layers, this model has 3"),
    ([LayerPlan(), LayerPlan(ffn=torch.arange(0)), LayerPlan()], r"layers.1: the plan keeps no ffn; skip: \[mlp\]"),
    ([LayerPlan(kv_groups=torch.arange(0))] * 3, r"layers.0: the plan keeps no kv_groups; skip: \[attention\]"),
    ([LayerPlan(ffn=torch.arange(200))] * 3, "another model: of its ffn, 0 to 95, it keeps 0 to 199"),
    ([LayerPlan(ffn=torch.tensor([3, 2]))] * 3, "ascending numbers"),
    ([LayerPlan(ffn=torch.tensor([2, 2]))] * 3, "2 to 2"),
    ([LayerPlan(heads=torch.tensor([0, 1, 2]))] * 3, r"the plan keeps \[2, 1, 0, 0\] heads of its KV groups"),
    ([LayerPlan(heads=torch.tensor([0, 2]), kv_groups=torch.tensor([0, 2]))] * 3, r"keeps \[1, 1, 0, 0\] heads")])
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(plan, fact):
    model = model_of("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LlmoptError, match=fact):
        apply_plan(model, plan, Run())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
