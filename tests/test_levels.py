"""Models that no table describes: their linear maps are found, quantized, and loaded again, layer by layer."""
import re
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

import llmopt
from llmopt.calibration.calls import logits_behind
from llmopt.calibration.walk import walk
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.model import discovery, levels
from llmopt.model.architectures import NO_ENTRY, SPECS
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.positions import attention_windows, rotary_tables
from llmopt.parts import build
from tests import tiny

UNKNOWN = [kind for kind in tiny.MORE if kind not in SPECS]
STAY = {                                # whose layers know their places, or which would lose all attention
    "gemma4_text": "tells of every layer by its number", "diffllama": "self_attn.lambda_init",
    "gemma3n_text": "embed_tokens_per_layer.weight has a part for each",
    "llama4_text": "would be another one at place 0", "gpt_neo": "less than one unit of blocks",
    "minimax": "self_attn.num_hidden_layers"}


def some(every):
    """Every so many kinds in the quick tier, all in the full one."""
    return [pytest.param(kind, marks=[] if i % every == 0 or kind in STAY else pytest.mark.full)
            for i, kind in enumerate(UNKNOWN)]



def padded():
    ids, mask = tiny.ids(4, 24), torch.ones(4, 24, dtype=torch.long)
    mask[1, 17:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]


@pytest.mark.parametrize("kind", some(2))
@torch.no_grad()
def test_a_walk_through_found_layers_is_the_plain_forward(kind):
    model, last = tiny.make(kind), None
    for visit in walk(model, padded()):
        assert visit.block.groups()
        last = visit
    for batch, hidden in zip(padded(), last.outputs_after_edit, strict=True):
        real = batch["attention_mask"].bool()
        assert torch.equal(logits_behind(model, batch, hidden)[real], model(**batch, use_cache=False).logits[real])


@pytest.mark.parametrize("kind", some(4))
def test_what_reads_one_input_is_found(kind):
    """In front of a real forward, the linear maps of a group read equal numbers, those of two groups do not."""
    model = tiny.make(kind)
    read = {}
    views = blocks(model)

    def note(name, module, args):
        read[name] = args[0].flatten()

    for p in (p for block in views for p in block.projections()):
        p.module.register_forward_pre_hook(partial(note, p.name))
    model(tiny.ids(2, 20), use_cache=False)
    for block in views:
        firsts = []
        for group in block.groups():
            assert all(torch.equal(read[p.name], read[group[0].name]) for p in group)
            firsts.append(read[group[0].name])
        assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


@pytest.mark.parametrize("kind", some(8))
def test_blocks_leave(kind, tmp_path):
    model, ids = tiny.make(kind), tiny.ids(4, 24)
    count = len(blocks(model))
    steps = [build("prune.magnitude", {"ratio": 0.45, "units": ["blocks"]})]
    try:
        llmopt.compress(model, steps, batches=ids)
    except LlmoptError as error:
        assert re.search(STAY.get(kind, "no layer with attention would remain"), str(error))
        return
    assert kind not in STAY and len(blocks(model)) == count - 1
    llmopt.save(model, tmp_path / "out")
    fresh, _ = load(tmp_path / "out")
    assert torch.equal(fresh(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("repair", [True, False])
def test_a_plan_that_drops_blocks_alone_asks_for_no_table(repair, tmp_path):
    model, ids = tiny.make("qwen3_5_text"), tiny.ids(4, 24)
    steps = [build("prune.plan", {"path": str(tmp_path / "plan.json"), "refit": repair})]
    (tmp_path / "plan.json").write_text('{"layers": [{"drop": true}, {"drop": false}, {}]}')
    llmopt.compress(model, steps, batches=ids)
    assert len(blocks(model)) == 2 and torch.isfinite(model(ids).logits).all()
    (tmp_path / "plan.json").write_text('{"layers": [{"skip": ["mlp"]}, {}]}')
    with pytest.raises(LlmoptError, match="steps.0 prune.plan: qwen3_5_text: .* level 'structure'.*channels and h"):
        llmopt.compress(model, steps, batches=ids)


def test_what_takes_more_than_weights_is_refused_by_its_level(tmp_path):
    model = tiny.make("lfm2")
    assert levels.described(model).startswith("run time; not structure: ")
    for name, fields in (("transform.rotate", {}), ("prune.depth", {"units": ["mlp"]})):
        with pytest.raises(LlmoptError, match=f"steps.0 {name}: lfm2: .* level 'structure'.*{NO_ENTRY}"):
            llmopt.compress(model, [build(name, fields)], batches=tiny.ids())
    with pytest.raises(LlmoptError, match=f"steps.0 prune.wanda: lfm2: ffn cannot be pruned: {NO_ENTRY}. Possible: bl"):
        llmopt.compress(model, [build("prune.wanda", {"units": ["ffn"]})], batches=tiny.ids())
    with pytest.raises(LlmoptError, match="allocate: heads takes the level 'structure'"):
        llmopt.compress(model, [build("heads.span", {}), build("quant.rtn", {
            "bits": 3.5, "group_size": 16, "allocate": "heads", "heads": "heads.span"})], batches=tiny.ids())


@pytest.mark.parametrize(("kind", "fields", "expected"), [
    ("gemma4_text", {"num_kv_shared_layers": 1, "layer_types": tiny.TYPES}, "made beside the hidden state"),
    ("gemma3n_text", {"num_kv_shared_layers": 1}, "made beside the hidden state"),
    ("bert", {}, "has an encoder")])
def test_layers_that_cannot_run_one_by_one_are_refused_by_name(kind, fields, expected):
    config = BertConfig(**tiny.BASE) if kind == "bert" else AutoConfig.for_model(kind, **tiny.MORE[kind] | fields)
    with pytest.raises(LlmoptError, match=f"architecture '{kind}' is not supported: .*{expected}"):
        llmopt.compress(AutoModelForCausalLM.from_config(config), [build("quant.rtn", {})])


def test_both_looks_that_failed_are_told(monkeypatch):
    told = {discovery.LOOKING: "it asks for a mask", None: "it has no such layer"}

    def seen(model, path, attention):
        raise LlmoptError(told[attention])

    monkeypatch.setattr(discovery, "_seen", seen)
    with pytest.raises(LlmoptError, match="^it asks for a mask; with its own attention: it has no such layer$"):
        discovery.found_of(tiny.make("bloom"), "transformer.h")
    told[None] = told[discovery.LOOKING]
    with pytest.raises(LlmoptError, match="^it asks for a mask$"):
        discovery.found_of(tiny.make("bloom"), "transformer.h")


def test_a_plan_tells_what_stays_dense():
    model = tiny.make("llama4_text", num_experts_per_tok=2)
    told = predict(model, [build("quant.rtn", {"group_size": 16})], "dense").steps[0][1]
    assert "left dense: 1 gate_up_proj, 1 down_proj (it is a stack of matrices, as experts are, and its products " \
           "cannot be seen one by one)" in told
    told = predict(tiny.make("deepseek_v3"), [build("quant.rtn", {"group_size": 16})]).steps[0][1]
    assert "gate_up_proj" not in told


@pytest.mark.parametrize("kind", SPECS)
def test_the_table_says_what_a_forward_shows(kind):
    model = tiny.make(kind)
    seen = discovery.found_of(model, spec_of(model).layers)
    for block, found, window in zip(blocks(model), seen, attention_windows(model), strict=True):
        groups = {frozenset(p.name.removeprefix(f"{block.name}.") for p in group) for group in block.groups()}
        assert groups <= set(map(frozenset, found.groups)) and (groups == set(map(frozenset, found.groups)) or
                                                                "moe" in kind)
        attends, = found.attention.values()
        assert (attends.heads, attends.kv_heads, attends.head_dim, attends.window) == (
            block.heads, block.kv_heads, block.head_dim, window)
        assert f"{block.name}.{next(iter(found.attention))}.{spec_of(model).out}" == block.attn_out.name
        assert found.entries == spec_of(model).entries and not found.earlier


@pytest.mark.parametrize(("kind", "flag", "value"), [
    ("stablelm", "use_parallel_residual", True), ("stablelm", "qk_layernorm", True), ("phi", "qk_layernorm", True),
    ("olmo", "clip_qkv", 0.5), ("gpt_bigcode", "multi_query", False)])
def test_a_config_that_the_table_does_not_know_is_looked_at(kind, flag, value):
    config = AutoConfig.for_model(kind, **tiny.MORE[kind], **{flag: value})
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tiny.ids()
    assert levels.described(model).startswith("run time; not structure")
    llmopt.compress(model, [build("quant.rtn", {"bits": 3, "group_size": 16})])
    assert torch.isfinite(model(ids).logits).all()


def test_keys_that_the_table_cannot_turn_back_are_refused_by_name():
    model = tiny.make("ernie4_5")
    with pytest.raises(LlmoptError, match="ernie4_5: its keys cannot be turned back .*neighbouring channels"):
        rotary_tables(model, 0, 8, torch.zeros(1))
    with pytest.raises(LlmoptError, match=f"ministral: how positions turn its keys is not known: {NO_ENTRY}"):
        rotary_tables(tiny.make("ministral"), 0, 8, torch.zeros(1))
