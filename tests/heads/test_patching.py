"""Patching: all heads together turn the answer, one by one they are forwards with that head exchanged."""
import pytest
import torch

import llmopt
from llmopt.calibration.probes import load
from llmopt.errors import LlmoptError
from llmopt.heads import Patching
from llmopt.heads.divergence import corrupted
from llmopt.heads.masking import masked
from llmopt.heads.patching import head_outputs, margin, wanted
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks
from tests import tiny

CONTRACT = {"probes": 3, "length": 30, "gate": False}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_each_score_is_a_forward_with_that_head_exchanged(family):
    model, run = tiny.make(family), Run()
    Patching(probes=2, length=24, gate=False).apply(model, run)
    found, changes = load("tokens", 2, 24, 0, model.config, None), []
    width = blocks(model)[0].head_dim
    expected = {(0, 1): 0.0, (1, 3): 0.0, (2, 0): 0.0}
    for probe in found:
        of = wanted(model, probe)
        assert of.wrong == int(probe.corrupted[probe.needle[0]]) and of.right == int(probe.answer[0])
        with head_outputs(model) as said:
            broken = margin(model, corrupted(probe), of)
        clean = margin(model, probe, of)
        changes.append(abs(broken - clean))
        for layer, head in expected:
            def exchange(module, args, layer=layer, head=head, said=said):
                z = args[0].clone()
                z[0, :, head * width:(head + 1) * width] = said[layer][:, head]
                return (z,)
            handle = blocks(model)[layer].attn_out.module.register_forward_pre_hook(exchange)
            expected[layer, head] += (margin(model, probe, of) - clean) * (1 if broken > clean else -1)
            handle.remove()
    for (layer, head), total in expected.items():
        assert float(run.scores["heads.patching"][layer][head]) == pytest.approx(total / sum(changes), abs=1e-4)


@torch.no_grad()
def test_with_all_heads_exchanged_the_answer_turns_and_few_of_them_do_it():
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    probe = load("world", 1, 120, 0, model.config, tokenizer)[0]
    of = wanted(model, probe)
    with head_outputs(model) as said:
        broken = margin(model, corrupted(probe), of)
    every = [torch.ones(block.heads, dtype=torch.bool) for block in blocks(model)]
    with masked(model, every, "mean", [said[layer] for layer in range(len(every))]):
        patched = margin(model, probe, of)
    assert margin(model, probe, of) > 0 > broken and patched == pytest.approx(broken, abs=1e-2)
    run = Run(tokenizer=tokenizer)
    record = Patching(probe="world", probes=2, length=120).apply(model, run)
    scores = torch.stack(run.scores["heads.patching"])
    assert scores.max() > .1 > 5 * scores.abs().median()
    assert record.meta["tried"] == 2


def test_a_context_that_changes_nothing_is_an_error(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"context": [3, 4, 5], "question": [4], "answer": [5], "corrupted": [3, 4, 5]}\n')
    for gate, said in ((True, "turn the answer"), (False, "change it")):
        with pytest.raises(LlmoptError, match=f"in none of the 1 probes does the corrupted context {said}"):
            Patching(probe=str(file), gate=gate).apply(tiny.make("llama"), Run())
    model = tiny.make("llama")
    unstated = Probe(torch.tensor([3, 4, 5]), torch.tensor([4]), torch.tensor([9]), torch.tensor([3, 6, 5]))
    said = model(corrupted(unstated).ids[None]).logits[0, 3].argmax()       # the answer stands nowhere in the context
    assert wanted(model, unstated) == (3, 9, int(said))
