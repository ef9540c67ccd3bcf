"""What feeds what: a scale moved along any link of any architecture changes no output, and the weights it should."""
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import llmopt
from llmopt.errors import LlmoptError
from llmopt.model.blocks import blocks, refuse_folding
from llmopt.model.links import Norm
from llmopt.model.outside import Outside
from tests import tiny

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
PLAIN = ("gpt_neox", "gpt2", "opt")             # an FFN without a gate


@torch.no_grad()
def logits(model):
    return model(tiny.ids(2, 24)).logits


def changed(model, before: dict) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_scale_moved_along_a_link_changes_no_output(family):
    model = tiny.make(family, norms=True)
    expected = logits(model)
    for block in blocks(model)[:2]:
        kinds = [link.producer.role if isinstance(link.producer, Norm) else None for link in block.links()]
        norms = [] if family == "olmo2" else ["attn_in"] if family in EXPERTS else ["attn_in", "ffn_in"]
        assert kinds == norms + [None] * (1 if family in (*PLAIN, *EXPERTS) else 2)
        for link in block.links():
            before = copy.deepcopy(model.state_dict())
            size = len(link.producer.gain if isinstance(link.producer, Norm) else link.producer.rows)
            link.scale_(1 + torch.rand(size, generator=torch.Generator().manual_seed(0)))
            moved = changed(model, before)
            assert {reader.key for reader in link.readers} < moved      # and the producer
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "readers"), [("cohere", 5), ("cohere2", 5), ("phi", 4)])
def test_one_norm_in_front_of_both_parts_is_read_by_both(family, readers):
    model = tiny.make(family, norms=True)
    expected, block = logits(model), blocks(model)[1]
    link, *rest = block.links()
    assert (link.producer.role, len(link.readers), len(rest)) == ("both_in", readers, readers - 3)
    assert [len(group) for group in block.groups()] == [readers, 1, 1]
    link.scale_(1 + torch.rand(64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    link.fold_()
    torch.testing.assert_close(link.producer.gain, torch.ones(64))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    without = copy.deepcopy(model)
    llmopt.compress(without, [llmopt.prune.Magnitude(ratio=0.4, units=["attention"], refit=False)])
    skipped, = (block for block in blocks(without) if block.attention is None)
    kept = blocks(model)[skipped.index]
    kept.attn_out.module.weight.data.zero_()
    if kept.attn_out.bias is not None:
        kept.attn_out.bias.zero_()
    torch.testing.assert_close(logits(without), logits(model), rtol=0, atol=1e-5)
    assert [len(link.readers) for link in skipped.links()][0] == readers - 3


def test_a_norm_that_has_no_weight_gives_none_up():
    model = tiny.make("olmo", norms=True)
    expected = logits(model)
    for link in (link for block in blocks(model) for link in block.links() if isinstance(link.producer, Norm)):
        assert (link.producer.kind, link.producer.gain, link.scalable) == ("layer", 1.0, False)
        link.fold_()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", [f for f in tiny.CONFIGS if f != "olmo2"])
def test_a_folded_norm_only_normalises(family):
    model = tiny.make(family, norms=True)
    expected, rest = logits(model), Outside(model)
    rest.untie()
    links = [link for block in blocks(model) for link in block.links() if isinstance(link.producer, Norm)]
    for link in links + rest.links():
        link.fold_()
        norm = link.producer
        torch.testing.assert_close(norm.gain, torch.ones(64))
        assert norm.bias is None or bool(norm.bias.any()) == (norm.role == "final")      # the head has no bias
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_a_gain_of_zero_is_not_divided_by():
    model = tiny.make("gpt2", norms=True)
    rest = Outside(model)
    rest.untie()
    rest.final_norm.module.weight.data[:8] = torch.tensor([0., 1e-30, -1e-7, 0., 2., -1., .5, 1.])
    expected = logits(model)
    rest.links()[0].fold_()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert rest.final_norm.gain[:8].tolist() == pytest.approx([0., 1e-30, -1e-7, 0., 1., 1., 1., 1.])


@pytest.mark.parametrize(("family", "tied"), [(f, "lm_head.weight") for f in ("llama", "gpt2", "opt", "gemma2")])
def test_untying_gives_the_head_a_weight_of_its_own(family, tied):
    model = tiny.make(family)
    rest, expected = Outside(model), logits(model)
    assert rest.tied and tied not in rest.parameters()
    rest.untie()
    assert not rest.tied and not model.config.tie_word_embeddings
    assert tied in rest.parameters() and rest.embeddings.weight is not rest.head.module.weight
    assert torch.equal(logits(model), expected)
    rest.untie()                                        # again: nothing


def test_norms_that_stand_elsewhere_are_refused_with_the_reason():
    with pytest.raises(LlmoptError, match="olmo2: norms cannot be folded: its norms stand behind the writers"):
        refuse_folding(tiny.make("olmo2"))
    config = OPTConfig(**tiny.BASE, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False)
    with pytest.raises(LlmoptError, match="opt: norms .*: its norms normalise the residual stream itself"):
        refuse_folding(AutoModelForCausalLM.from_config(config))
    config = OPTConfig(**tiny.BASE, ffn_dim=96, word_embed_proj_dim=32)
    with pytest.raises(LlmoptError, match="differ in width: another map stands between"):
        Outside(AutoModelForCausalLM.from_config(config)).links()
