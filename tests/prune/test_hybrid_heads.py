"""Heads and KV groups of models some of whose layers attend, their query rows with gates between them."""
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmopt
from llmopt import prune
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.parts import build
from llmopt.prune.groups import cost
from llmopt.prune.latency import shape_of
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.run import pipeline
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from tests import seeing, tiny, warm
from tests.command import ROOT, command
from tests.plans import contents, dense, plan
from tests.prune.test_surgery import mask, pick
from tests.test_contract import applied

FOUR = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=8)
ALIKE = {"groups": [LayerPlan(kv_groups=pick(4, 1)), LayerPlan(kv_groups=pick(4, 0))],
         "heads": [LayerPlan(heads=torch.tensor([1, 2, 4, 7])), LayerPlan(heads=torch.tensor([0, 3, 5, 6]))]}
OTHERS = [LayerPlan(kv_groups=pick(4, 1)), LayerPlan(heads=torch.tensor([0, 3, 5, 6]), ffn=pick(96, 7))]
BY_TYPE = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, attention_k_eq_v=True,
               per_layer_config={2: {"head_dim": 16, "num_key_value_heads": 2}})        # its keys are its values, too
TYPED = {"groups": [LayerPlan(kv_groups=kept) for kept in (pick(4, 1, 2), pick(4, 0, 3), pick(2, 0))],
         "heads": [LayerPlan(heads=torch.tensor([*pair])) for pair in ([1, 2, 4, 7], [0, 2, 5, 6], [0, 1, 5, 6])],
         "both": [LayerPlan(heads=torch.tensor([1, 2, 4, 7]))] * 2 + [LayerPlan(kv_groups=pick(2, 0))]}
CHANGES = {"gemma4_text": BY_TYPE}
SCORES = [name for name in llmopt.names() if name.startswith("heads.") and name != "heads.hess"]
PADDED = {"input_ids": tiny.ids(3, 30).clamp(max=89), "attention_mask": torch.ones(3, 30, dtype=torch.long)}
PADDED["attention_mask"][1, :7] = 0


def made(kind):
    return tiny.make(kind, norms=True, **CHANGES.get(kind, FOUR)) if kind in tiny.MORE else seeing.make(kind)


def every(model, some):
    """A plan of all layers: `some`, one after the other, of those that attend."""
    left = iter(some)
    return [LayerPlan() if block.attention is None else next(left) for block in blocks(model)]


@torch.no_grad()
def behaviour(model):
    """Logits of the real tokens of a padded batch, and a greedy text of every row."""
    text = model.generate(**PADDED, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model(**PADDED).logits[PADDED["attention_mask"].bool()], text


def assert_alike(model, other):
    found, expected = behaviour(model), behaviour(other)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("kind", "some"), [
    ("qwen3_5_text", ALIKE["groups"]), ("qwen3_5_text", ALIKE["heads"]), ("qwen3_5_text", OTHERS),
    ("qwen3_next", ALIKE["heads"]), ("qwen3_5_moe_text", ALIKE["groups"]),
    ("gemma4_text", TYPED["groups"]), ("gemma4_text", TYPED["both"]),
    pytest.param("gemma4_text", TYPED["heads"], marks=pytest.mark.full),
    ("qwen3_5", [LayerPlan(kv_groups=pick(2, 0))]), ("gemma4", [LayerPlan(kv_groups=pick(2, i % 2)) for i in range(3)]),
    pytest.param("qwen3_5_moe", [LayerPlan(heads=torch.tensor([1, 2]))], marks=pytest.mark.full)])
def test_the_heads_that_leave_are_what_the_model_loses(kind, some, tmp_path):
    """As the dense model whose writers read nothing from them; linear attention keeps its heads; read back exactly."""
    model, like, before = made(kind), made(kind), made(kind)
    apply_plan(model, every(model, some), Run())
    llmopt.save(model, tmp_path / "out")
    mask(like, every(like, some))
    assert_alike(model, like)
    assert not torch.allclose(behaviour(model)[0], behaviour(before)[0], atol=1e-2)
    for own, old, layer in zip(blocks(model), blocks(before), every(before, some), strict=True):
        if own.attention is None:
            assert all(torch.equal(a, b) for a, b in zip(own.module.state_dict().values(),
                                                         old.module.state_dict().values(), strict=True))
        else:
            heads, rows = layer.kept_heads(old), old.attention.q_proj.weight.view(old.heads, -1, 64)
            assert torch.equal(own.attention.q_proj.weight, rows[heads].flatten(0, 1))
            assert len(own.attention.q_norm.weight) == own.head_dim == old.head_dim
    assert_alike(load(tmp_path / "out")[0], model)


READ_BACK = {
    "bits": ("qwen3_5_text", [("prune.obs", {"ratio": 0.5, "units": ["q_heads"]}),
                              ("quant.gptq", {"bits": 4, "group_size": 8})]),
    "types": ("gemma4_text", [("prune.wanda", {"ratio": 0.5, "units": ["kv_groups"]}),
                              ("quant.gptq", {"bits": 4, "group_size": 8})]),
    "experts": ("qwen3_next", [("prune.wanda", {"ratio": 0.5, "units": ["kv_groups"]})]),
    "layers": ("qwen3_5_text", [("prune.wanda", {"ratio": 0.4, "units": ["kv_groups"], "scope": "global"})])}


@pytest.mark.parametrize("names", [("bits", "layers"), pytest.param(tuple(READ_BACK), marks=pytest.mark.full)])
def test_it_is_read_back_by_those_who_can(names, tmp_path):
    """Stock transformers where the config holds the heads, with 4 bits on top too; else trusted code and llmopt."""
    models = {}
    for name in names:
        kind, steps = READ_BACK[name]
        models[name] = made(kind)
        llmopt.compress(models[name], [build(*step) for step in steps], batches=tiny.ids(8, 24))
        llmopt.save(models[name], tmp_path / name)
        assert_alike(AutoModelForCausalLM.from_pretrained(tmp_path / name), models[name])
    counts = {name: [block.kv_heads for block in blocks(model) if block.heads] for name, model in models.items()}
    assert counts.get("experts", [2, 2]) == [2, 2] and counts.get("types", [2, 2, 1]) == [2, 2, 1]
    assert len({*counts["layers"]}) == 2
    folders = {name: tmp_path / name for name in models}
    done = warm.run(ROOT / "tests" / "load_many.py", "plain,trust", tmp_path / "r.pt", *folders.values(),
                    env=command()[1])
    assert not done.returncode, done.stderr
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))       # as in load_many.py
    plain, trusted = torch.load(tmp_path / "r.pt").values()
    for name, folder in folders.items():
        assert ("error" in plain[str(folder)]) == (name == "layers")
        for found in ([] if name == "layers" else [plain[str(folder)]]) + [trusted[str(folder)]]:
            torch.testing.assert_close(found["logits"], models[name](ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.full)
                                  for i, name in enumerate(SCORES)])
def test_any_head_score_is_a_criterion(name):
    model, _, scores = applied(name, "qwen3_5_text")
    record = prune.Heads(heads=name, ratio=0.5, units=["q_heads"], refit=False).apply(model, Run(scores=dict(scores)))
    for layer, own in zip(record.meta["layers"], scores[name], strict=True):
        assert layer["heads"] == ([2 * g + int(row[1] >= row[0]) for g, row in enumerate(own.view(2, 2))]
                                  if len(own) else [])


@pytest.mark.full
@pytest.mark.parametrize(("kind", "changes", "scope"), [
    ("qwen3_5_text", FOUR, "global"), ("gemma4_text", BY_TYPE, "local")])
def test_streamed_and_by_a_plan_it_is_the_same(kind, changes, scope, tmp_path):
    steps = (f"[prune.wanda: {{ratio: 0.5, units: [ffn, kv_groups], scope: {scope}}}, "
             "quant.gptq: {bits: 4, group_size: 8, clip: false}, kv.snapkv: {ratio: 0.5, window: 4}]")
    recipe = plan(tmp_path, dense(tmp_path, kind, **changes), steps)
    for streamed in (False, True):
        pipeline.run(recipe, tmp_path / f"{streamed}", streaming=Streaming(streamed))
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    model, found = tiny.make(kind, **changes), blocks(load(tmp_path / "True")[0])
    llmopt.compress(model, [prune.ByPlan(path=str(tmp_path / "True"))], batches=tiny.ids())
    assert [(b.heads, b.kv_heads, b.width) for b in blocks(model)] == [(b.heads, b.kv_heads, b.width) for b in found]
    assert min(block.kv_heads for block in found if block.heads) < 4


def test_a_dry_run_looks_at_a_layer_that_has_heads(tmp_path):
    """Most layers have none."""
    more = FOUR | dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
    steps = ("[heads.span: {}, prune.heads: {heads: heads.span, units: [q_heads], ratio: 0.5}, "
             "quant.rtn: {bits: 8, group_size: -1}]")
    recipe = plan(tmp_path, dense(tmp_path, "qwen3_5_text", **more), steps)
    assert dry_run(recipe)["predicted_bytes"] == pipeline.run(recipe, tmp_path / "out").size


def test_a_gate_is_part_of_the_price():
    """H/G = 2 heads, each D rows of q, D of its gate and D columns of o; D rows of k and of v."""
    block = blocks(made("qwen3_5_text"))[1]
    assert cost(block, "kv_groups") == 64 * 8 * (2 * 2 + 2 + 2)
    assert cost(block, "q_heads") == 64 * 8 * 3
    assert shape_of(block, "kv_groups").queries == 2
    assert shape_of(block, "kv_groups").run(2, "decode", torch.zeros(0))().shape == (1, 64)


@pytest.mark.parametrize(("kind", "steps", "said"), [
    ("qwen3_next", {"units": ["q_heads"], "scope": "pagcp"}, "per_layer_shapes cannot be stored: attention parts only"),
    ("qwen3_5", {}, "per_layer_shapes cannot be stored: .* Possible: scope: local and one kind of units, which keep"),
    ("qwen3_next", {}, "ffn cannot be pruned: of its layers a table knows the heads alone"),
    ("qwen3_5_text", {"units": ["attention"]}, "takes the level 'structure', and .* channels and heads alone"),
    ("lfm2", {"units": ["q_heads"]}, "q_heads cannot be pruned: no table tells what its layers are made of")])
def test_what_else_would_leave_is_refused_by_name(kind, steps, said):
    model = tiny.make(kind, **FOUR if kind == "qwen3_next" else {}) if kind in tiny.MORE else seeing.make(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LlmoptError, match=f"{kind}: .*{said}"):
        llmopt.compress(model, [build("prune.magnitude", {"ratio": 0.3} | steps)], batches=tiny.ids())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("some", [
    [LayerPlan(kv_groups=pick(4, 1)), LayerPlan(kv_groups=pick(4, 0)), LayerPlan(kv_groups=pick(2, 0))],
    [LayerPlan(heads=torch.tensor([1, 2, 4, 7])), LayerPlan(kv_groups=pick(4, 0, 3)), LayerPlan(kv_groups=pick(2, 0))]])
def test_what_a_config_by_types_cannot_hold_is_refused(some):
    """Layers of one type with other KV heads; layers of two with other query heads."""
    model = made("gemma4_text")
    with pytest.raises(LlmoptError, match="gemma4_text: its config has one number of query heads for all layers"):
        apply_plan(model, some, Run())
    assert_alike(model, made("gemma4_text"))


@pytest.mark.parametrize(("kind", "why"), [("qwen3_next", "attention parts only"), ("qwen3_5_moe_text", "attention p")])
def test_other_heads_in_another_layer_are_refused_where_the_config_cannot_hold_them(kind, why):
    model = made(kind)
    plan = every(model, [LayerPlan(kv_groups=pick(4, 1)), LayerPlan()])
    with pytest.raises(LlmoptError, match=f"{kind}: per_layer_shapes cannot be stored: {why}"):
        apply_plan(model, plan, Run())
    assert_alike(model, made(kind))


def test_a_plan_that_keeps_heads_of_linear_attention_is_for_another_model():
    with pytest.raises(LlmoptError, match="layers.0: the plan is for another .* keeps kv_groups, and this layer has n"):
        apply_plan(made("qwen3_5_text"), [LayerPlan(kv_groups=pick(4, 1))] * 4, Run())
