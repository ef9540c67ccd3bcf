"""Models that no table describes, at run time: cache and sparse attention where the model attends as most do."""
import re

import pytest
import torch

import llmopt
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.model import levels
from llmopt.model.abilities import abilities_of
from llmopt.model.architectures import SPECS
from llmopt.model.blocks import blocks
from llmopt.parts import build
from llmopt.runtime import attached
from tests import tiny

NONE = "none of its layers attends by transformers' attention interface"
REFUSED = {
    **dict.fromkeys(("gptj", "codegen", "bloom", "falcon", "mpt", "gpt_neo", "xglm", "mamba", "falcon_mamba", "mamba2"),
                    NONE),
    "minimax": "it takes no cache but one of a class of its own",
    "recurrent_gemma": "it does not give back the cache that it fills",
    "llama4_text": "its attention is cut into chunks",
    "diffllama": "asks for more than one attention", "doge": "asks for a mask of its own",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "caches what keys and values are made of, not these (MLA)")}
RUNNING = [kind for kind in tiny.MORE if kind not in REFUSED and kind not in SPECS]
SHAPE = {"sinks": 2, "window": 6, "min_length": 0}
SNAP = build("kv.snapkv", {"ratio": 0.5, "window": 8})


def some(every):
    return [pytest.param(kind, marks=[] if i % every == 0 else pytest.mark.full) for i, kind in enumerate(RUNNING)]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_attends_otherwise_is_refused_by_name(kind):
    model, reason = tiny.make(kind), REFUSED[kind]
    assert f"not run time: {levels.lacking(model)['run time']}" in levels.described(model)
    for step in (SNAP, build("heads.span", {}), build("attention.a_shape", SHAPE)):
        with pytest.raises(LlmoptError, match=f"steps.0 {step.name}: {kind}: .*{re.escape(reason)}"):
            llmopt.compress(model, [step], batches=tiny.ids())
    with pytest.raises(LlmoptError, match=re.escape(reason)), attached(model, SNAP):
        pass


@pytest.mark.parametrize("kind", some(3))
@torch.no_grad()
def test_a_cache_that_drops_nothing_changes_nothing(kind):
    model, ids, more = tiny.make(kind), tiny.ids(2, 40), tiny.ids(2, 7, seed=5)
    first = model(ids)
    at = {"position_ids": torch.arange(40, 47)[None]} if kind == "bamba" else {}        # which counts from 0 again
    then = model(more, past_key_values=first.past_key_values, **at).logits
    with attached(model, build("kv.snapkv", {"budget": 400})):
        again = model(ids)
        torch.testing.assert_close(again.logits, first.logits, atol=1e-5, rtol=1e-4)
        behind = model(more, past_key_values=again.past_key_values).logits
        torch.testing.assert_close(behind, then, atol=1e-4, rtol=1e-3)
    assert torch.equal(model(ids).logits, first.logits)


@pytest.mark.parametrize("kind", some(3))
@torch.no_grad()
def test_beside_others_and_padded_a_prompt_is_compressed_as_it_is_alone(kind):
    model, ids = tiny.make(kind), tiny.ids(2, 40)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :6] = mask[1, :6] = 0
    with attached(model, build("kv.snapkv", {"budget": 12, "window": 4, "sinks": 2})):
        beside = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[1, 40:]
        alone = model.generate(ids[1:, 6:], max_new_tokens=6, do_sample=False)[0, 34:]
    assert len(alone) and beside[:len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", some(4))
def test_scores_cache_and_sparse_attention_of_a_recipe_come_back_from_disk(kind, tmp_path):
    model, ids = tiny.make(kind), tiny.ids(4, 40)
    with torch.no_grad():
        dense = model(ids).logits
    rounded = {"group_size": 16} | ({"ignore": ["experts"]} if abilities_of(model)["quant.*"] else {})
    steps = [build("heads.gradient", {}), build("quant.rtn", rounded), SNAP, build("attention.a_shape", SHAPE)]
    report = llmopt.compress(model, steps, batches=ids)
    scores = report.records[0]["meta"]["scores"]
    assert [len(row) for row in scores] == [block.heads for block in blocks(model)]
    assert all(min(row, default=1) > 0 for row in scores) and max(map(len, scores)) == model.config.num_attention_heads
    llmopt.save(model, tmp_path / "out", report=report)
    fresh, _ = load(tmp_path / "out")
    with torch.no_grad():
        one, two = model(ids), fresh(ids)
    assert torch.equal(one.logits, two.logits) and not torch.allclose(one.logits, dense, atol=1e-3)
    assert two.past_key_values.nbytes() == one.past_key_values.nbytes()
    assert report.cache_after < report.cache_before
