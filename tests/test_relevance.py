"""Relevance is conserved through every block, by rules that leave what the model computes alone."""
import pytest
import torch

from llmopt.calibration.relevance import relevance
from llmopt.model.blocks import blocks
from tests import tiny

IDS = tiny.ids(1, 24)[0]


def logit(model) -> float:
    """The sum of the next tokens' logits."""
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    return float(logits[:-1].gather(1, IDS[1:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_all_of_the_logit_passes_through_every_block(family):
    model = tiny.make(family)
    before = logit(model)
    found = relevance(model, IDS, {block.name: block.module for block in blocks(model)})
    assert len(found) == len(blocks(model))
    for values in found.values():
        assert float(values.double().sum()) == pytest.approx(before, rel=1e-4)
    assert logit(model) == before                                  # no rule has stayed behind


def test_the_two_writers_of_a_block_share_what_the_stream_does_not_bring():
    """Behind a block the stream is the sum of what came in and what was written: so is its relevance."""
    model = tiny.make("llama")
    one, block = blocks(model)[0], blocks(model)[1]
    found = relevance(model, IDS, {"in": one.module, "out": block.module, "attention": block.attn_out.module,
                                   "ffn": block.ffn_out.module})
    plain = tiny.make("llama")
    blocks(plain)[1].ffn_out.write(torch.zeros_like(blocks(plain)[1].ffn_out.weight))
    silent = relevance(plain, IDS, {"ffn": blocks(plain)[1].ffn_out.module})
    assert bool((silent["ffn"] == 0).all())
    assert float(found["out"].sum()) == pytest.approx(float(found["in"].sum()), rel=1e-4)
    assert float(found["attention"].abs().sum()) > 0 and float(found["ffn"].abs().sum()) > 0


def test_models_with_biases_and_other_norms_run():
    for family in ("gpt2", "opt", "gemma3_text", "olmo2"):
        model = tiny.make(family)
        found = relevance(model, IDS, {block.name: block.ffn_out.module for block in blocks(model)})
        assert all(bool(values.isfinite().all()) for values in found.values())
