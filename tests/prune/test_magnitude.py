"""prune.magnitude through its base: scores by hand, shares, floors, rounding, records, refit."""
import json

import pytest
import torch

import llmopt
from llmopt.calibration.second_moments import Gram
from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.forecast.size import predict
from llmopt.kv import Streaming
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.modeling import saved_config
from llmopt.model.shapes import shapes
from llmopt.parts import build
from llmopt.prune import Magnitude, Wanda
from llmopt.prune.groups import COARSE, FINE, mean_square
from llmopt.prune.refit import refit, solve
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.quant import RTN
from tests import tiny

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
HEADS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", *EXPERTS)
REFUSED = {("olmo2", "kv_groups"): "norms", ("olmo2", "q_heads"): "norms", ("opt", "mlp"): "module of its own",
           **{(f, u): "head_dim" for f in ("gpt_neox", "gpt2", "opt") for u in ("kv_groups", "q_heads")},
           **{(f, u): "experts" for f in EXPERTS for u in ("ffn", "mlp")},
           **{(f, "attention"): "alike" for f in EXPERTS}}


def model_of(family, **changes):
    if family in HEADS:
        changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8} | changes
    return tiny.make(family, **changes)


def data(rows=8, length=24):
    ids = tiny.ids(rows, length)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


@pytest.mark.parametrize("unit", FINE + COARSE)
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_family_loses_every_unit_or_says_why_not(family, unit):
    model = model_of(family)
    method = Magnitude(ratio=0.5 if unit in FINE else 0.34, units=[unit], refit=False)
    if (family, unit) in REFUSED:
        with pytest.raises(LlmoptError, match=REFUSED[family, unit]):
            method.apply(model, Run())
        assert [s.skip for s in shapes(model)] == [s.skip for s in shapes(model_of(family))]
        return
    before = model.num_parameters()
    record = method.apply(model, Run())
    assert 0.3 < record.meta["removed_share"] <= method.ratio
    assert record.meta["parameters"] == [before, model.num_parameters()]
    assert model.num_parameters() < before
    assert model(tiny.ids()).logits.isfinite().all()
    assert saved_config(model)[1] == (unit in ("attention", "mlp"))
    json.dumps(record.meta)


@pytest.mark.parametrize("family", [f for f in HEADS if f not in ("phi3", *EXPERTS)])
def test_global_scope_lets_layers_differ(family):
    model = model_of(family)
    for block in blocks(model)[:1]:
        for projection in block.projections():
            projection.write(projection.weight * torch.linspace(0.2, 2, projection.out_features)[:, None])
    record = Magnitude(ratio=0.3, scope="global", normalize="lamp", refit=False).apply(model, Run())
    assert len(set(shapes(model))) > 1
    assert 0.25 < record.meta["removed_share"] <= 0.3
    assert saved_config(model)[1]


def test_scores_by_hand():
    model = tiny.make("llama")
    block = blocks(model)[0]
    for projection in block.projections():
        projection.write(torch.zeros_like(projection.weight))
    block.part("gate")[0].weight[5] = 1
    block.part("up")[0].weight[5] = 2
    block.ffn_out.weight[:, 5] = 3
    block.part("k")[0].weight[16:32] = 1                    # group 1 of two, D = 16, E = 64
    assert mean_square(block, "ffn")[5].item() == pytest.approx((1 + 4 + 9) / 3)
    assert mean_square(block, "ffn").count_nonzero() == 1
    assert mean_square(block, "kv_groups").tolist() == [0, pytest.approx(16 / (16 * 6))]    # k of k, v, 2 q, 2 o


def test_the_smallest_channels_leave():
    model = tiny.make("qwen2")
    for block in blocks(model):
        for projection in block.ffn_in:
            projection.weight[[3, 40, 77]] *= 0.01
        block.ffn_out.weight[:, [3, 40, 77]] *= 0.01
    kept = blocks(tiny.make("qwen2"))[0].ffn_in[0].weight[[i for i in range(96) if i not in (3, 40, 77)]]
    record = Magnitude(ratio=3 / 96, units=["ffn"], refit=False).apply(model, Run())
    assert torch.equal(blocks(model)[0].ffn_in[0].weight, kept)
    assert record.meta["removed_units"] == {"ffn": 9}


def test_rescaling_a_layer_moves_nothing_unless_raw():
    def widths(normalize, scale):
        model = tiny.make("llama")
        for projection in blocks(model)[1].projections():
            projection.write(projection.weight * scale)
        Magnitude(ratio=0.4, scope="global", units=["ffn"], normalize=normalize, refit=False).apply(model, Run())
        return [shape.width for shape in shapes(model)]

    for normalize in ("layer", "lamp"):
        assert widths(normalize, 0.5) == widths(normalize, 1.0)
    assert widths("none", 0.5)[1] == 5                      # the floor of 5 % is all that stays
    assert widths("none", 0.5)[0] > 80


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
@torch.no_grad()
def test_a_scale_moved_between_norm_and_readers_changes_no_score(family):
    def scores(block):
        return [mean_square(block, unit) for unit in ("ffn", "kv_groups")]

    model = tiny.make(family)
    block = blocks(model)[1]
    before = scores(block)
    gain = torch.linspace(0.25, 4, 64)
    for role, readers in (("attn_in", block.attn_in), ("ffn_in", block.ffn_in)):
        norm = block.norms[role]
        norm.module.weight.copy_((norm.module.weight + norm.offset) * gain - norm.offset)
        for projection in readers:
            projection.write(projection.weight / gain)
    for mine, theirs in zip(scores(block), before, strict=True):
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_gains_have_no_say_in_which_block_leaves():
    model = tiny.make("llama")
    before = mean_square(blocks(model)[1], "blocks")
    for norm in blocks(model)[1].norms.values():
        norm.module.weight.mul_(0.1)
    assert torch.equal(mean_square(blocks(model)[1], "blocks"), before)


def test_widths_are_rounded_to_the_multiple_and_the_record_says_so():
    for scope in ("local", "global"):
        model = model_of("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
        record = Magnitude(ratio=0.4, scope=scope, refit=False).apply(model, Run(ahead=(RTN(group_size=32),)))
        for shape in shapes(model):
            assert shape.width % 32 == 0
            assert shape.heads * 8 % 32 == 0
        assert record.meta["multiple"] == 32
        assert record.meta["removed_share"] <= 0.4
        assert [layer["ffn"] for layer in record.meta["layers"]] == [shape.width for shape in shapes(model)]


def test_a_dense_ratio_changes_nothing():
    model = tiny.make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Magnitude(ratio=0, refit=False).apply(model, Run())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_head_scores_follow():
    run = Run(scores={"heads.x": [torch.arange(8.0)] * 3})
    model = model_of("llama")
    record = Magnitude(ratio=0.25, units=["kv_groups"], refit=False).apply(model, run)
    for kept, told in zip(run.scores["heads.x"], record.meta["layers"], strict=True):
        assert kept.tolist() == told["heads"]
        assert len(kept) == 6


@pytest.mark.parametrize(("fields", "key"), [
    ({"ratio": 1.0}, "ratio"), ({"ratio": -0.1}, "ratio"), ({"ratio": "x"}, "ratio"), ({"scope": "both"}, "scope"),
    ({"units": ["heads"]}, "units"), ({"units": []}, "units"), ({"units": ["ffn", "ffn"]}, "units"),
    ({"units": ["blocks", "ffn"]}, "units"), ({"units": ["q_heads", "kv_groups"]}, "units"),
    ({"minimum": 0.0}, "minimum"), ({"normalize": "l1"}, "normalize"),
])
def test_bad_fields_are_named(fields, key):
    with pytest.raises(LlmoptError, match=key):
        build("prune.magnitude", fields)


def test_ratios_that_cannot_be_met():
    with pytest.raises(LlmoptError, match=r"less than one unit of kv_groups \(0.5, rounding included; nothing"):
        Magnitude(ratio=0.1, units=["kv_groups"], refit=False).apply(tiny.make("llama"), Run())
    with pytest.raises(BudgetError, match="cannot be met"):
        Magnitude(ratio=0.99, refit=False).apply(tiny.make("llama"), Run())
    with pytest.raises(FieldError):
        Magnitude(ratio=2.0)


def test_refit_by_hand():
    """Input 1 repeats input 0: what it wrote moves over to input 0."""
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    gram = Gram()
    gram.add(x[:150])
    gram.add(x[150:])
    torch.testing.assert_close(gram.whole().float(), x.T @ x, rtol=1e-4, atol=1e-3)
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
    torch.testing.assert_close(solve(weight, gram.whole(), torch.tensor([0, 2])).float(),
                               torch.tensor([[3.0, 3.0], [-1.0, 1.0]]), atol=0.05, rtol=0)
    assert torch.equal(solve(weight, gram.whole(), torch.arange(3)).float(), weight)


def test_refit_never_increases_the_local_error():
    generator = torch.Generator().manual_seed(3)
    for rank in (2, 6, 40):
        x = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 12, generator=generator)
        weight, kept = torch.randn(5, 12, generator=generator), torch.tensor([0, 3, 4, 8, 11])
        error = [((x[:, kept] @ w.float().T - x @ weight.T) ** 2).sum()
                 for w in (solve(weight, x.T @ x, kept), weight[:, kept])]
        assert error[0] <= error[1]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_the_bias_takes_over_what_a_constant_input_wrote(family):
    """Channel 5 fires alike for every token: its writer's column can leave without a trace."""
    model, ids = tiny.make(family), tiny.ids(8, 24)
    block = blocks(model)[0]
    for projection in block.ffn_in:
        projection.weight[5] = 0
        projection.bias[5] = 2.0
    block.ffn_out.weight[:, 5] = torch.linspace(-1, 1, 64)
    before = model(ids).logits
    plan = [LayerPlan(ffn=torch.tensor([i for i in range(96) if i != 5])), LayerPlan(), LayerPlan()]
    refit(model, Run(batches=data()), plan, "refit")
    apply_plan(model, plan, Run())
    assert (model(ids).logits - before).norm() < 0.02 * before.norm()


def test_a_refit_on_inputs_that_overflow_is_refused():
    model = tiny.make("llama")
    blocks(model)[0].ffn_in[1].weight[3] = torch.inf
    with pytest.raises(LlmoptError, match="layers.0.mlp.down_proj: cannot be refitted"):
        refit(model, Run(batches=data()), [LayerPlan(ffn=torch.arange(90))] + [LayerPlan()] * 2, "refit")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_refit_beats_none_on_the_outputs(family):
    def error(refitted):
        model = model_of(family)
        units = ["ffn", "kv_groups"] if family in HEADS else ["ffn"]
        Magnitude(ratio=0.4, units=units, refit=refitted).apply(model, Run(batches=data(16, 32)))
        with torch.no_grad():
            return (model(tiny.ids(16, 32)).logits - model_of(family)(tiny.ids(16, 32)).logits).square().mean().item()

    assert error(True) < 0.95 * error(False)


def test_refit_needs_data_and_what_does_without_says_what_it_costs(caplog):
    assert Magnitude().needs_data and not Magnitude().notes(Run())
    for coarse in (["blocks"], ["attention", "mlp"]):               # nothing is left to refit
        assert not Magnitude(units=coarse).needs_data and not Magnitude(units=coarse).notes(Run())
    with pytest.raises(LlmoptError, match="needs calibration data and there is none; refit: false does without"):
        Magnitude().apply(tiny.make("llama"), Run())
    plain = Magnitude(refit=False)
    assert not plain.needs_data
    assert "worse than channels drawn at random" in predict(tiny.make("llama"), [plain]).steps[0][1]
    assert plain.apply(tiny.make("llama"), Run()).meta["notes"] == plain.notes(Run())
    assert "prune.magnitude: chosen by weights alone" in caplog.text
    assert "without the refit" in Wanda(refit=False).notes(Run())[0]


def test_a_model_that_loses_nothing_is_not_refitted():
    assert "refit" not in Magnitude(ratio=0).apply(tiny.make("llama"), Run(batches=data())).meta


def test_refit_touches_only_what_loses_inputs():
    model = tiny.make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = [LayerPlan(), LayerPlan(ffn=torch.arange(90)), LayerPlan()]
    refit(model, Run(batches=data()), plan, "refit")
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert not model.state_dict()[changed[0]][:, 90:].any()


def test_widths_fit_the_groups_of_the_steps_ahead_and_of_no_other():
    """In one recipe: the quantization behind the pruning counts, whatever runs at run time does not."""
    model = tiny.make("llama")
    narrow = Magnitude(ratio=0.4, units=["ffn"], refit=False)
    llmopt.compress(model, [narrow, RTN(bits=4, group_size=16), Streaming(budget=16)])
    assert {shape.width for shape in shapes(model)} == {64}             # of 96; 57 without the step ahead
    model = tiny.make("llama")
    assert narrow.apply(model, Run()).meta["multiple"] == 1
    assert {shape.width for shape in shapes(model)} == {58}


def test_scores_that_are_no_numbers_and_tied_projections_are_refused(monkeypatch):
    monkeypatch.setattr(Magnitude, "score", lambda self, block, visit: {"ffn": torch.full((96,), torch.nan)})
    with pytest.raises(LlmoptError, match="layers.0: the scores of its ffn are not finite"):
        Magnitude(units=["ffn"], refit=False).apply(tiny.make("llama"), Run())
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight
    with pytest.raises(LlmoptError, match="layer 1: mlp.gate_proj.weight and mlp.up_proj.weight are tied"):
        llmopt.compress(model, [Magnitude(units=["ffn"], refit=False)])
