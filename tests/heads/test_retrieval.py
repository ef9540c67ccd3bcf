"""Retrieval scores by hand-built attention, their gate, and the heads of the reference model."""
import pytest
import torch
from torch import tensor

import llmopt
from llmopt.errors import LlmoptError
from llmopt.heads import Retrieval
from llmopt.heads.retrieval import answered, hit, mass
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks
from tests import tiny

CONTRACT = {"gate": False, "hits": "mass", "length": 24, "probes": 16}
PROBE = Probe(tensor([1, 7, 8, 5, 6]), tensor([4]), tensor([7, 8]))      # needle: places 1 and 2, asked at 5 and 6


def one_hot(places, rest=0.0):      # [2], of each step -> [2, 7]
    return torch.full((2, 7), rest).scatter(1, tensor(places)[:, None], 1 - 6 * rest)


def test_a_head_that_copies_and_others_that_do_not():
    maps = torch.stack([one_hot([1, 2]),        # all of it
                        one_hot([1, 1]),        # half: the second time another token is written
                        one_hot([2, 1]),        # in the wrong order
                        one_hot([5, 5])])
    found = hit(maps, torch.arange(7), PROBE, tensor([0, 1]))
    assert found.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert found.mean(1).tolist() == [1, .5, 0, 0]
    assert hit(maps[:, 1:, 1:], torch.arange(1, 7), PROBE, tensor([1])).tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]


def test_mass_is_the_attention_on_the_needle():
    maps = torch.stack([one_hot([1, 2], 0.05), one_hot([5, 1], 0.0)])
    found = mass(maps, torch.arange(7), PROBE, tensor([0, 1])).sum(1) / 2
    assert found[1] == .5
    assert .7 - 1e-6 < float(found[0]) < .75 + 1e-6     # .7 each time, and a tie may bring in the other token


def recalled(**fields):
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    run = Run(tokenizer=tokenizer)
    record = Retrieval(probe="world", probes=12, length=200, **fields).apply(model, run)
    return model, run.scores["heads.retrieval"], record


def test_few_heads_of_the_reference_model_retrieve():
    model, scores, record = recalled()
    every = torch.cat(scores)
    assert every.max() > .7 and (every < .1).float().mean() > .7
    assert record.meta["tried"] == 12 and 10 <= record.meta["samples"] <= 12
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gate_leaves_out_what_the_model_gets_wrong():
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    run, score = Run(tokenizer=tokenizer), Retrieval(probe="world", probes=6, length=200)
    run.probes = llmopt.calibration.probes.load("world", 6, 200, 0, model.config, tokenizer)
    wrong = Probe(run.probes[0].context, run.probes[1].question, run.probes[0].answer)
    assert [answered(model, run.probes[0]), answered(model, wrong)] == [1, 0]
    run.probes[3] = wrong
    assert 3 not in score.chosen(model, run) and len(score.chosen(model, run)) >= 4
    assert Retrieval(gate=False).chosen(model, run) == [*range(6)]


def test_nothing_answered_and_no_needle_are_one_line(tmp_path):
    with pytest.raises(LlmoptError, match=r"none of the 4 probes \(tokens\).*gate: false.*probe: p.jsonl"):
        Retrieval(probes=4, length=24).apply(tiny.make("llama"), Run())
    file = tmp_path / "p.jsonl"
    file.write_text('{"context": [3, 4, 5], "question": [4], "answer": [6]}\n')
    with pytest.raises(LlmoptError, match="probe 1: the answer does not stand in its context"):
        Retrieval(probe=str(file)).apply(tiny.make("llama"), Run())


@pytest.mark.parametrize("hits", ["top", "mass"])
@torch.no_grad()
def test_tiles_add_up_to_the_models_own_maps(hits, monkeypatch):
    monkeypatch.setattr("llmopt.runtime.attention_rows.ENTRIES", 1)      # one query a tile
    model, run = tiny.make("gemma2"), Run()
    score = Retrieval(probes=16, length=24, gate=False, hits=hits)
    score.apply(model, run)
    found = llmopt.calibration.probes.load("tokens", 16, 24, 0, model.config, None)
    model.set_attn_implementation("eager")
    expected = [torch.zeros(block.heads) for block in blocks(model)]
    for probe in found:
        for total, weights in zip(expected, model(probe.ids[None], output_attentions=True).attentions, strict=True):
            of = {"top": hit, "mass": mass}[hits]
            total += of(weights[0, :, probe.asked], torch.arange(len(probe.ids)), probe, torch.arange(3)).mean(1) / 16
    for mine, eager in zip(run.scores["heads.retrieval"], expected, strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=1e-4)
