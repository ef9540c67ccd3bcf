"""What scorers may ask of a layer: keys before RoPE, the output weight."""
import pytest
import torch
from llmopt_evals.large import on_disk
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from llmopt import kv, runtime
from llmopt.model.blocks import blocks
from llmopt.specs import ModelSpec
from tests.tiny import ids, make

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CASES = {name: (name, {}) for name in ("llama", "mistral", "qwen3", "phi3", "gemma3_text", "olmo2", "gpt_neox", "gpt2",
                                       "opt", "mixtral")}
CASES |= {"yarn": ("llama", {"rope_parameters": YARN}),
          "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
          "partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                   "partial_rotary_factor": 0.5}}),
          "per_type": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})}


def views_of(model, tokens, **given):
    """Views of all layers, row by row, at the compression after one forward."""
    found = []

    class Spy(kv.SnapKV):
        def score(self, view):
            found.append(view)
            return view.positions.float()

    with runtime.attached(model, Spy(budget=9, window=8, sinks=0)):
        model(tokens, use_cache=True, **given)
    return found


def projected(model, tokens, **given):
    """Per layer, what the k and q projections (with their norms) gave: [B, heads, T, D] each, caught by hooks."""
    caught, handles = {}, []
    for block in blocks(model):
        for part, heads in (("k", block.kv_heads), ("q", block.heads)):
            projection, rows = block.part(part)
            norm = dict(block.attention.named_children()).get(f"{part}_norm")

            def hook(module, args, out, key=(block.index, part), rows=rows, heads=heads, normed=norm is not None):
                if not normed:
                    out = out[..., rows.flatten()]
                caught[key] = out.reshape(*out.shape[:2], heads, -1).transpose(1, 2) if out.ndim == 3 else \
                    (out if out.shape[1] == heads else out.transpose(1, 2))
            handles.append((norm or projection.module).register_forward_hook(hook))
    model(tokens, use_cache=False, **given)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keys_and_queries_before_rope(case):
    family, changes = CASES[case]
    model, tokens = make(family, **changes), ids(2, 30)
    want = projected(model, tokens)
    turned = False
    for view, (row, layer) in zip(views_of(model, tokens), _order(model), strict=True):
        assert view.layer == layer
        keys, at = want[layer, "k"][row], view.positions[0, 0]
        assert_close(view.unrotated_keys()[0], keys[:, at], atol=1e-5, rtol=1e-5)
        queries = want[layer, "q"][row, :, -8:] * (model.config.hidden_size // 4) ** (-0.5 * (family == "opt"))
        assert_close(view.unrotated_queries()[0], queries, atol=1e-5, rtol=1e-5)
        assert_close(view.rotated(view.unrotated_keys(), view.positions), view.keys, atol=1e-5, rtol=1e-5)
        turned |= not torch.allclose(view.keys, view.unrotated_keys(), atol=1e-2)
    assert turned == (family not in ("gpt2", "opt"))


def _order(model):
    """Layers are compressed one after the other, in each of them row by row."""
    return [(row, layer) for layer in range(model.config.num_hidden_layers) for row in range(2)]


@torch.no_grad()
def test_padding_and_position_ids_are_minded():
    model, tokens = make("llama"), ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :8] = 0
    places = [(mask.cumsum(-1) - 1).clamp(min=0), mask.cumsum(-1) * 3]
    for given in (dict(attention_mask=mask), *(dict(attention_mask=mask, position_ids=p) for p in places)):
        want = projected(model, tokens, **given)
        for view, (row, layer) in zip(views_of(model, tokens, **given), _order(model), strict=True):
            assert view.lengths.tolist() == [22 if row else 30]
            assert_close(view.unrotated_keys()[0], want[layer, "k"][row, :, -view.keys.shape[2]:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma3_text"])
@torch.no_grad()
def test_output_weight_takes_heads_to_the_stream(family):
    model, tokens = make(family), ids(1, 30)
    block = blocks(model)[1]
    caught = []
    handle = block.attn_out.module.register_forward_hook(lambda module, args, out: caught.append((args[0], out)))
    view = [v for v in views_of(model, tokens) if v.layer == 1][0]
    handle.remove()
    heads = caught[0][0].unflatten(-1, (block.heads, block.head_dim))                    # [B, T, H, D]
    bias = 0 if block.attn_out.bias is None else block.attn_out.bias
    weight = view.output_weight()
    assert weight.shape == (block.heads, block.head_dim, caught[0][1].shape[-1])
    assert_close(torch.einsum("bthd,hde->bte", heads, weight) + bias, caught[0][1], atol=1e-4, rtol=1e-4)


def test_the_output_weight_of_a_model_whose_weights_are_on_disk(tmp_path):
    model, tokens = make("llama"), ids(1, 30)
    model.save_pretrained(tmp_path / "model")
    filed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "offload",
                                                 device_map=on_disk(ModelSpec(id=str(tmp_path / "model"))))
    assert sum(parameter.is_meta for parameter in filed.parameters()) > 20
    for mine, theirs in zip(views_of(model, tokens), views_of(filed, tokens), strict=True):
        assert torch.equal(mine.output_weight(), theirs.output_weight())
