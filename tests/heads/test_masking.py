"""Masked heads: 0, their mean, or the mean of the values that they can see; everything comes back."""
import pytest
import torch

from llmopt.errors import LlmoptError
from llmopt.heads.masking import masked, mean_outputs, ranked, silenced
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny


def outputs(model, ids, **given):
    """z of the first block, [B, T, H, D]."""
    block, found = blocks(model)[0], []
    handle = block.attn_out.module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits = model(ids, **given).logits
    handle.remove()
    return found[0].unflatten(-1, (block.heads, block.head_dim)), logits


def only(model, layer, head):
    return silenced([torch.zeros(block.heads) for block in blocks(model)], [(layer, head)])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_an_even_head_says_the_running_mean_of_its_values(family):
    model, ids = tiny.make(family), tiny.ids(2, 24)
    plain, logits = outputs(model, ids)
    block = blocks(model)[0]
    values, projection = [], block.part("v")[0]
    handle = projection.module.register_forward_hook(lambda module, args, out: values.append(out))
    with masked(model, only(model, 0, 1), "uniform"):
        found, changed = outputs(model, ids)
    handle.remove()
    v = values[0][..., block.part("v")[1][1 // (block.heads // block.kv_heads)]]                    # [B, T, D]
    window = 16 if family.startswith("gemma") else 24
    expected = torch.stack([v[:, max(0, t - window + 1):t + 1].mean(1) for t in range(24)], 1)
    torch.testing.assert_close(found[:, :, 1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(changed, logits)
    assert torch.equal(model(ids).logits, logits)
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    with masked(model, silenced([torch.zeros(block.heads) for block in blocks(model)], []), "uniform"):
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_even_head_sees_the_cache_and_no_padding():
    model, ids = tiny.make("llama"), tiny.ids(1, 24)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(29) >= 5).long()[None]
    with masked(model, only(model, 1, 2), "uniform"):
        whole = model(ids).logits
        first = model(ids[:, :20], use_cache=True)
        later = model(ids[:, 20:], past_key_values=first.past_key_values).logits
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 5:]
    torch.testing.assert_close(later, whole[:, 20:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beside, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_zero_and_mean_by_hand(family):
    model, ids = tiny.make(family), tiny.ids(3, 20)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    means = mean_outputs(model, Run(batches=[{"input_ids": ids, "attention_mask": mask}]))
    z, logits = outputs(model, ids, attention_mask=mask)
    torch.testing.assert_close(means[0], z[mask.bool()].mean(0), atol=1e-5, rtol=1e-4)
    with masked(model, only(model, 0, 3), "zero"):
        changed = outputs(model, ids)[1]
    writer = blocks(model)[0].attn_out
    columns = slice(3 * blocks(model)[0].head_dim, 4 * blocks(model)[0].head_dim)
    kept = writer.weight[:, columns].clone()
    writer.weight[:, columns] = 0
    torch.testing.assert_close(changed, model(ids).logits, atol=1e-5, rtol=1e-4)
    writer.weight[:, columns] = kept
    with masked(model, only(model, 0, 3), "mean", means):
        spoken, fixed = [], writer.module.register_forward_hook(lambda module, args, out: spoken.append(args[0]))
        model(ids)
        fixed.remove()
    torch.testing.assert_close(spoken[0][..., columns], means[0][3].expand(3, 20, -1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ranks_and_what_cannot_be_masked():
    scores = [torch.tensor([1., 3.]), torch.tensor([]), torch.tensor([3., 0.])]
    assert ranked(scores) == [(0, 1), (2, 0), (0, 0), (2, 1)]
    assert [s.tolist() for s in silenced(scores, [(2, 0)])] == [[False, False], [], [True, False]]
    model = tiny.make("llama")
    model.set_attn_implementation("llmopt_rows")
    with pytest.raises(LlmoptError, match="this model runs 'llmopt_rows'"), masked(model, only(model, 0, 0), "uniform"):
        pass
