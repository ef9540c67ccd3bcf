"""`llmopt export --format nemotron-nas`: what a server computes from the files is what the checkpoint computes."""
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import llmopt
from llmopt.checkpoint.nemotron_nas import block_config, export, groups_of
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.shapes import LayerShape
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny
from tests.command import call

EVERY = torch.arange
PLANS = {
    "alike": lambda: [LayerPlan(ffn=EVERY(16))] * 3,
    "widths": lambda: [LayerPlan(), LayerPlan(ffn=EVERY(8)), LayerPlan(ffn=EVERY(1, 30))],
    "skipped": lambda: [LayerPlan(skip=("mlp",)), LayerPlan(skip=("attention",)), LayerPlan(skip=("attention", "mlp"))],
    "fewer KV heads": lambda: [LayerPlan(), LayerPlan(kv_groups=torch.tensor([1])), LayerPlan()],
    "fewer query heads": lambda: [LayerPlan(heads=torch.tensor([1, 3])), LayerPlan(), LayerPlan()]}


def served(folder, ids):
    """Logits as a server computes them: every layer by its block_config, and by nothing else that tells its shape."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    weights = load_file(folder / "model.safetensors")
    told, left = config.to_dict(), set(weights)
    hidden, heads, dim = told["hidden_size"], told["num_attention_heads"], told["head_dim"]

    def take(name):
        left.discard(name)
        return weights.get(name)

    def linear(x, name):
        return nn.functional.linear(x, take(f"{name}.weight"), take(f"{name}.bias"))

    def norm(x, name):
        return nn.functional.rms_norm(x, (hidden,), take(f"{name}.weight"), told["rms_norm_eps"])

    x = nn.functional.embedding(ids, take("model.embed_tokens.weight"))
    inverse = told["rope_parameters"]["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    angles = (torch.arange(ids.shape[1])[:, None] * inverse).repeat(1, 2)
    for index, block in enumerate(config.block_configs):
        at = f"model.layers.{index}"
        if not block.attention.no_op:
            y, groups = norm(x, f"{at}.input_layernorm"), heads // block.attention.n_heads_in_group
            q, k, v = (linear(y, f"{at}.self_attn.{name}_proj").unflatten(-1, (count, dim)).transpose(1, 2)
                       for name, count in (("q", heads), ("k", groups), ("v", groups)))
            q, k = (z * angles.cos() + torch.cat([-z[..., dim // 2:], z[..., :dim // 2]], -1) * angles.sin()
                    for z in (q, k))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        if not block.ffn.no_op:
            width = vars(block.ffn).get("intermediate_size")
            if width is None:
                width = -(-int(2 * block.ffn.ffn_mult * hidden / 3) // 256) * 256
            assert weights[f"{at}.mlp.gate_proj.weight"].shape == (width, hidden)
            y = norm(x, f"{at}.post_attention_layernorm")
            x = x + linear(nn.functional.silu(linear(y, f"{at}.mlp.gate_proj")) * linear(y, f"{at}.mlp.up_proj"),
                           f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if told["tie_word_embeddings"] else "lm_head"
    found = linear(norm(x, "model.norm"), head)
    assert not left                                     # a server stops at tensors that it has no place for
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_server_computes_the_same(kind, plan, tmp_path):
    model = tiny.make(kind, num_hidden_layers=3, **({"sliding_window": None} if kind == "mistral" else {}))
    apply_plan(model, PLANS[plan](), Run())
    llmopt.save(model, tmp_path / "made")
    export(tmp_path / "made", tmp_path / "served")
    ids = tiny.ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(served(tmp_path / "served", ids), model(ids).logits, atol=1e-5, rtol=1e-4)


def test_widths_by_hand():
    full = LayerShape(8, 2, 512)
    assert block_config(full, 8, 100) == {
        "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4},
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5 * 511.5 / 100}}
    for width in range(256, 20_000, 256):
        for hidden in (576, 4096, 5120):
            multiple = block_config(LayerShape(8, 2, width), 8, hidden)["ffn"]["ffn_mult"]
            assert -(-int(2 * multiple * hidden / 3) // 256) * 256 == width
    gone = block_config(LayerShape(0, 0, 0, ("attention", "mlp")), 8, 100)
    assert gone["attention"]["no_op"] and gone["ffn"]["no_op"]
    assert [groups_of(LayerShape(3 * n, n, 1), 9) for n in (1, 2, 3)] == [1, 3, 3]
    assert groups_of(LayerShape(2, 2, 1), 8) == 2


def test_the_command_says_what_it_did(tmp_path, monkeypatch, capfd):
    model = tiny.make("llama", num_hidden_layers=3)
    apply_plan(model, PLANS["fewer KV heads"](), Run())
    llmopt.compress(model, [llmopt.kv.SnapKV(ratio=0.5)])
    llmopt.save(model, tmp_path / "made")
    assert call(monkeypatch, "export", tmp_path / "made", tmp_path / "served", "--format", "nemotron-nas") == 0
    out = capfd.readouterr().out
    assert "layers 1 have been filled up" in out and "kv.snapkv" in out and "vllm serve" in out
    assert not [name for name in load_file(tmp_path / "served/model.safetensors") if name.startswith("llmopt.")]
    assert call(monkeypatch, "export", tmp_path / "made", tmp_path / "served", "--format", "nemotron-nas") == 2
    assert "is not empty" in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "fields", "says"), [
    ("qwen3", {}, "Llama's layout alone"), ("mistral", {"sliding_window": 8}, "sliding windows")])
def test_what_no_server_computes_is_refused(kind, fields, says, tmp_path):
    tiny.make(kind, **fields).save_pretrained(tmp_path / "model")
    with pytest.raises(LlmoptError, match=says):
        export(tmp_path / "model", tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_a_server_begins_with_attention(tmp_path):
    model = tiny.make("llama", num_hidden_layers=3)
    apply_plan(model, [LayerPlan(skip=("attention",)), LayerPlan(), LayerPlan()], Run())
    llmopt.save(model, tmp_path / "made")
    with pytest.raises(LlmoptError, match="layer 0 has lost its attention"):
        export(tmp_path / "made", tmp_path / "served")


def test_packed_weights_go_over_as_they_are(tmp_path):
    model = tiny.make("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=64)
    llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=32)])
    llmopt.save(model, tmp_path / "made")
    export(tmp_path / "made", tmp_path / "served")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "served"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    made, found = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("made", "served"))
    assert found["quantization_config"] == made["quantization_config"]
