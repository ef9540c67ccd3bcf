"""The table of architectures is what happens; and configs as they are found in the wild survive a recipe."""
import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import llmopt
from llmopt.checkpoint.save import contents, load
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.architectures import SPECS, UNITS
from llmopt.model.blocks import blocks
from llmopt.parts import build
from tests import table, tiny
from tests.tiny import BASE, EXPERTS, GATED, WIDE

TABLE = {cell: reason for cell, reason in table.read().items() if cell[0] in SPECS}
PLAIN = {"bits": 4, "group_size": 16, "clip": False, "sweeps": 0}
GLOBAL = {"ratio": 0.3, "scope": "global", "normalize": "none"}
CELLS = {
    "heads.*": ("heads.gradient", {}),
    "kv.*": ("kv.snapkv", {"ratio": 0.5, "window": 8}),
    "attention.*": ("attention.a_shape", {"sinks": 2, "window": 6, "min_length": 0}),
    "quant.*": ("quant.rtn", {"bits": 3, "group_size": 32}),
    **{unit: ("prune.magnitude", {"ratio": 0.5 if unit in UNITS[:3] else 0.4, "units": [unit]}) for unit in UNITS},
    "widths by layer": ("prune.magnitude", GLOBAL | {"units": ["ffn"]}),
    "transform.fold_norms": ("transform.fold_norms", {}),
    "transform.rotate": ("transform.rotate", {}),
    "transform.smoothquant": ("transform.smoothquant", {}),
    "heads by layer": ("prune.magnitude", GLOBAL | {"units": ["kv_groups"]}),
}


def step(name, fields, model, **run):
    ids = tiny.ids(8, 48)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    return build(name, fields).apply(model, Run(batches=batches, **run))


@torch.no_grad()
def behaviour(model):
    """Logits [2, 64, V] of a prompt and of what is read after it."""
    ids = tiny.ids(2, 64, seed=3)
    first = model(ids[:, :56], use_cache=True)
    return torch.cat([first.logits, model(ids[:, 56:], past_key_values=first.past_key_values).logits], 1)


def test_the_table_names_every_architecture_and_every_part():
    assert set(TABLE) == {(family, column) for family in SPECS for column in CELLS}


LATER = [kind for kind in SPECS if kind in tiny.MORE]           # near relatives: in the quick tier some of their cells
PAIRS = [pytest.param(family, column, marks=pytest.mark.full if family in LATER and (i + 4 * j) % 7 else [])
         for i, family in enumerate(SPECS) for j, column in enumerate(CELLS)]


@pytest.mark.parametrize(("family", "column"), PAIRS)
def test_a_cell_of_the_table_is_what_happens(family, column):
    model = tiny.make(family, norms=column.startswith("transform."))
    for projection in blocks(model)[0].projections():
        projection.write(projection.weight * 0.3)           # global scope then takes more from this layer
    before, reason = behaviour(model), TABLE[family, column]
    if reason is not None:
        with pytest.raises(LlmoptError) as caught:
            step(*CELLS[column], model)
            contents(model, "portable")
        assert reason in str(caught.value)
        return
    record = step(*CELLS[column], model)
    _, config, _ = contents(model, "portable")
    if column.startswith("transform."):
        torch.testing.assert_close(behaviour(model), before, rtol=0, atol=1e-4)
    else:
        assert torch.equal(behaviour(model), before) == (column == "heads.*")
    assert ("per_layer_config" in config) == (column in ("attention", "mlp", "widths by layer", "heads by layer"))
    json.dumps(record.meta)


TOGETHER = (("ffn", "kv_groups", "blocks", "transform.rotate", "quant.*", "kv.*"),
            ("widths by layer", "heads by layer", "attention.*"), ("attention", "mlp"), ("q_heads", "quant.*"))


@pytest.mark.parametrize(("family", "columns"), [
    pytest.param(family, columns, marks=[] if (i + j) % 4 == 0 else pytest.mark.full)
    for i, family in enumerate(LATER) for j, columns in enumerate(TOGETHER)])
def test_what_cells_of_a_later_architecture_do_comes_back_from_disk(family, columns, tmp_path):
    model = tiny.make(family, norms=True)
    for projection in blocks(model)[0].projections():
        projection.write(projection.weight * 0.3)
    before = behaviour(model)
    for part, fields in (CELLS[column] for column in columns if TABLE[family, column] is None):
        step(part, fields | ({"group_size": 16} if "group_size" in fields else {}), model)
    llmopt.save(model, tmp_path / "out")
    fresh, _ = load(tmp_path / "out")
    assert torch.equal(behaviour(fresh), behaviour(model)) and not torch.equal(behaviour(model), before)


def test_what_is_not_portable_can_be_written_dense():
    model = tiny.make("gpt2")
    step(*CELLS["quant.*"], model)
    assert "quantization_config" not in contents(model, "dense")[1]


NAMED = dict(vocab_size=tiny.VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2 = dict(NAMED, n_embd=64, n_layer=3, n_head=4, n_positions=256)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
WILD = {
    "llama-bias": LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "llama-rope-llama3": LlamaConfig(**GATED, rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "llama-one-kv-head": LlamaConfig(**GATED | {"num_key_value_heads": 1}),
    "llama-as-many-kv-heads": LlamaConfig(**GATED | {"num_key_value_heads": 4}),
    "mistral-wide-heads": MistralConfig(**GATED, head_dim=32, sliding_window=8),
    "qwen2-sliding": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3-bias-sliding": Qwen3Config(**GATED, head_dim=32, attention_bias=True, use_sliding_window=True,
                                      sliding_window=8, max_window_layers=2),
    "gemma2-softcap": Gemma2Config(**WIDE, sliding_window=8, query_pre_attn_scalar=20, attn_logit_softcapping=5.0),
    "gemma3-rope-by-type": Gemma3TextConfig(
        **WIDE, sliding_window=8, query_pre_attn_scalar=20, layer_types=TYPES, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}),
    "olmo2-bias": Olmo2Config(**GATED, attention_bias=True),
    "phi3-longrope": Phi3Config(**GATED, original_max_position_embeddings=32, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32, "factor": 8.0}),
    "phi4-partial-tied": Phi3Config(**GATED, partial_rotary_factor=0.75, tie_word_embeddings=True),
    "neox-serial-partial": GPTNeoXConfig(**BASE, intermediate_size=96, rotary_pct=0.25, use_parallel_residual=False,
                                         attention_bias=False),
    "neox-tied": GPTNeoXConfig(**BASE, intermediate_size=96, tie_word_embeddings=True),
    "gpt2-scaled": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2-upcast": GPT2Config(**GPT2, reorder_and_upcast_attn=True),
    "opt-350m": OPTConfig(**BASE, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt-no-bias": OPTConfig(**BASE, ffn_dim=96, word_embed_proj_dim=64, enable_bias=False,
                             layer_norm_elementwise_affine=False),
    "qwen3-moe-some-dense": Qwen3MoeConfig(**WIDE, **EXPERTS, mlp_only_layers=[1]),
}


def wild(name, dtype):
    """A random model in which biases matter too."""
    torch.manual_seed(0)
    implementation = "eager" if "softcap" in name else None         # as transformers itself asks of Gemma-2
    model = AutoModelForCausalLM.from_config(copy.deepcopy(WILD[name]), dtype=dtype,
                                             attn_implementation=implementation).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("bias"):
                parameter.normal_(std=0.12)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if i % 2 else [])
                                  for i, name in enumerate(WILD)])
def test_a_config_of_the_wild_survives_a_whole_recipe(name, tmp_path):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[list(WILD).index(name) % 3]
    model = wild(name, dtype)
    unit = "kv_groups" if "moe" in name else "ffn"
    before = behaviour(model)
    for part, fields in [("heads.span", {}), ("prune.magnitude", {"ratio": 0.5, "units": [unit]}),
                         ("quant.gptq", PLAIN), CELLS["attention.*"], CELLS["kv.*"]]:
        step(part, fields, model, ahead=(build("quant.rtn", {"group_size": 16}),))
    llmopt.save(model, tmp_path / "out", format="dense" if name.startswith("gpt2") else "portable")
    fresh, _ = load(tmp_path / "out")
    assert fresh.dtype == dtype
    assert torch.equal(behaviour(fresh), behaviour(model))
    assert not torch.allclose(before, behaviour(model), atol=1e-2)


def test_of_mixture_of_experts_plan_and_card_say_what_stays_dense(tmp_path):
    model, method = tiny.make("qwen2_moe"), build(*CELLS["quant.*"])
    told = predict(model, [method])
    report = llmopt.compress(model, [method])
    llmopt.save(model, tmp_path / "out", report=report)
    card = (tmp_path / "out/README.md").read_text()
    for text in (told.steps[0][1], card):
        assert "left dense: 3 shared_expert_gate (too small to be worth it)" in text
    assert SPECS["qwen2_moe"].note not in card
    assert told.bytes == (tmp_path / "out/model.safetensors").stat().st_size


def test_counts_that_the_config_itself_refuses_are_refused_before_anything_changes():
    model = wild("phi3-longrope", torch.float32)
    before = behaviour(model)
    with pytest.raises(LlmoptError, match="phi3: its config refuses 2 query heads: .*short_factor"):
        step("prune.magnitude", {"ratio": 0.5, "units": ["kv_groups"]}, model)
    assert torch.equal(behaviour(model), before)
