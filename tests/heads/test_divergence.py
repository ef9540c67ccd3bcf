"""Divergence against the outputs of two plain forwards."""
import pytest
import torch

import llmopt
from llmopt.calibration.probes import load
from llmopt.errors import LlmoptError
from llmopt.heads import Divergence
from llmopt.heads.divergence import corrupted
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny

CONTRACT = {"probes": 4, "length": 40}


def said(model, ids):
    """z of every block, [T, H, D]."""
    found = []
    handles = [block.attn_out.module.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
               for block in blocks(model)]
    model(ids[None])
    for handle in handles:
        handle.remove()
    return [z.unflatten(1, (4, -1)) for z in found]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_it_is_the_difference_of_two_forwards(family):
    model, run = tiny.make(family), Run()
    record = Divergence(probes=3, length=30).apply(model, run)
    found = load("tokens", 3, 30, 0, model.config, None)
    for layer in range(3):
        pairs = [(said(model, p.ids)[layer][p.asked], said(model, corrupted(p).ids)[layer][p.asked]) for p in found]
        change = torch.stack([(a - b).square().sum(2).sqrt().mean(0) for a, b in pairs]).mean(0)
        share = torch.stack([((a - b).norm(dim=2) / a.norm(dim=2)).mean(0) for a, b in pairs]).mean(0)
        torch.testing.assert_close(run.scores["heads.divergence"][layer], change, atol=1e-5, rtol=1e-4)
        assert record.meta["relative"][layer] == pytest.approx(share.tolist(), rel=1e-4, abs=1e-5)


def test_nothing_corrupted_nothing_changed(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"context": [3, 4, 5], "question": [4], "answer": [5], "corrupted": [3, 4, 5]}\n')
    run = Run()
    Divergence(probe=str(file)).apply(tiny.make("llama"), run)
    assert all(layer.tolist() == [0] * 4 for layer in run.scores["heads.divergence"])
    file.write_text('{"context": [3, 4, 5], "question": [4], "answer": [5]}\n')
    with pytest.raises(LlmoptError, match="probe 1 has no `corrupted`"):
        Divergence(probe=str(file)).apply(tiny.make("llama"), Run())


def test_the_heads_of_the_reference_model_that_retrieve_change_most():
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    run = Run(tokenizer=tokenizer)
    for score in (Divergence(probe="world", probes=8, length=200), llmopt.heads.Retrieval(probe="world", length=200)):
        score.apply(model, run)
    changed, found = (torch.stack(run.scores[f"heads.{name}"]) for name in ("divergence", "retrieval"))
    before = slice(0, 4)                                                # nothing can change before it is retrieved
    assert changed[before].max() < .5 * changed[found > .5].mean()
