"""Probes: what they hold, where they come from, and a head score that eats them."""
import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import tensor

import llmopt
from llmopt import parts, recipe
from llmopt.calibration.probes import as_batches, load
from llmopt.calibration.walk import visits
from llmopt.errors import LlmoptError
from llmopt.heads import ProbeScore
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks
from llmopt.parts import in_our_words
from llmopt.run import pipeline
from llmopt.run.marks import is_finished
from llmopt.run.opening import Streaming
from llmopt.scale.processes import Ranks
from tests import tiny
from tests.plans import contents


@in_our_words
@dataclass(frozen=True)
class Retrieval(ProbeScore):
    """A toy: how much of its attention a head gives to the needle while the answer is written."""

    name: ClassVar = "heads.toy"
    needs_whole: ClassVar = False
    mean_over: ClassVar = "samples"

    @torch.no_grad()
    def measure(self, model, run):
        totals = [torch.zeros(block.heads) for block in blocks(model)]

        def see(index, rows):
            needle = run.probes[index].needle
            at = rows.weights[0, :, torch.arange(len(needle)), needle - rows.keys[0]]      # each to its own token
            totals[rows.layer] += at.mean(1).cpu()

        batches = as_batches(run.probes)
        for visit in visits(model, replace(run, batches=batches), self.name, edits=False):
            visit.attention(see, [probe.asked for probe in run.probes])
        return {"scores": [total / len(run.probes) for total in totals]}


def given(source: str, config, tokenizer=None, count: int = 8, length: int = 64, seed: int = 0) -> list[Probe]:
    return load(source, count, length, seed, config, tokenizer)


def test_a_probe_by_hand():
    probe = Probe(tensor([1, 7, 8, 5, 7, 8, 9]), tensor([4]), tensor([7, 8]))
    assert probe.ids.tolist() == [1, 7, 8, 5, 7, 8, 9, 4, 7, 8]
    assert probe.ids[probe.asked].tolist() == [4, 7]                # what stands in front of each token of the answer
    assert probe.needle.tolist() == [4, 5]                          # the last time
    assert Probe(tensor([1, 7]), tensor([4]), tensor([8])).needle is None
    assert Probe(tensor([1]), tensor([4]), tensor([8, 9])).needle is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_planted_ids_work_on_any_model(family):
    config = tiny.make(family).config
    for probe in given("tokens", config):
        assert len(probe.context) == len(probe.corrupted) == 64
        assert probe.context[0] == 1 and not {0, 2} & set(probe.ids.tolist())       # BOS; neither pad nor eos
        differ = (probe.context != probe.corrupted).nonzero().flatten()
        assert torch.equal(differ, probe.needle)
        key = probe.context[probe.needle - 3]
        assert torch.equal(key, probe.question) and torch.equal(probe.context[probe.needle], probe.answer)
        assert probe.context.tolist().count(int(key[0])) == 1
    again, other = given("tokens", config), given("tokens", config, seed=1)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(given("tokens", config), again, strict=True))
    assert not torch.equal(again[0].ids, other[0].ids)
    with pytest.raises(LlmoptError, match=r"probe \(tokens\): a context of 6 tokens"):
        given("tokens", config, length=6)


@torch.no_grad()
def test_the_reference_model_answers_the_worlds_probes_and_not_the_corrupted_ones():
    model, tokenizer = llmopt.load("llmopt/reference")
    found = given("world", model.config, tokenizer, count=12, length=200)
    right = [[int(model(torch.cat([context, probe.question])[None]).logits[0, -1].argmax()) == int(probe.answer)
              for context in (probe.context, probe.corrupted)] for probe in found]
    assert sum(whole for whole, _ in right) >= 11 and sum(broken for _, broken in right) <= 1
    assert all(len(probe.context) <= 200 for probe in found)
    with pytest.raises(LlmoptError, match="this model has another: use probe: tokens"):
        given("world", model.config)


@torch.no_grad()
def whole_forward(model, found: list[Probe]) -> torch.Tensor:
    """The toy's score by the model's own maps, all of them."""
    model.set_attn_implementation("eager")
    maps = [torch.stack(model(p.ids[None], output_attentions=True).attentions)[:, 0] for p in found]    # [L, H, T, T]
    model.set_attn_implementation("sdpa")
    asked = [torch.arange(p.asked.start, p.asked.stop) for p in found]
    at = [m[:, :, rows, p.needle].mean(2) for m, rows, p in zip(maps, asked, found, strict=True)]
    return torch.stack(at).mean(0).flatten()


def test_the_heads_that_retrieve_are_found_in_the_reference_model():
    """Few heads look at the needle of a fact that was stated once; at random they would give it 1 part in 200."""
    model, tokenizer = llmopt.load("llmopt/reference", dtype="float32")
    run = Run(tokenizer=tokenizer)
    record = Retrieval(probe="world", probes=8, length=200).apply(model, run)
    scores = torch.cat(run.scores["heads.toy"])
    assert scores.max() > .5 and scores.median() < .05
    assert record.meta["samples"] == 8 and record.meta["tokens"] > 8 * 100
    found = given("world", model.config, tokenizer, 8, 200)
    torch.testing.assert_close(scores, whole_forward(model, found), atol=1e-4, rtol=1e-3)
    parts_of = []
    for rank in (0, 1):                              # what two processes would each compute, weighed by their share
        own = Run(tokenizer=tokenizer, ranks=Ranks(rank, 2), probes=found).own_probes
        assert len(own) == 4
        parts_of.append(torch.cat(Retrieval().measure(model, Run(probes=own))["scores"]))
    torch.testing.assert_close(sum(parts_of) / 2, scores, rtol=1e-4, atol=1e-6)


LINES = [{"context": "the fox has seven", "question": "fox has", "answer": "seven", "corrupted": "the fox has eight"},
         {"context": [1, 5, 6], "question": [5], "answer": [6]}]


def test_probes_of_a_file(tmp_path):
    model, tokenizer = llmopt.load("llmopt/reference")
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    text, ids = given(str(file), model.config, tokenizer)
    assert text.context[0] == tokenizer.bos_token_id and len(text.context) == len(text.corrupted) == 5
    assert text.question.tolist() == tokenizer("fox has", add_special_tokens=False)["input_ids"]
    assert ids.ids.tolist() == [1, 5, 6, 5, 6] and ids.corrupted is None
    assert len(given(str(file), model.config, tokenizer, count=1)) == 1


@pytest.mark.parametrize(("line", "said"), [
    ({"context": [1], "question": [2]}, "line 1: the answer is missing"),
    ({"context": [1], "question": [2], "answer": [3], "corupted": [1]}, "unknown key 'corupted' .did you mean 'corrup"),
    ({"context": [1], "question": [2], "answer": [3], "corrupted": [1, 1]}, "corrupted has 2 tokens and the context 1"),
    ({"context": [1], "question": [2], "answer": [96]}, "token id 96 does not fit"),
    ({"context": [1] * 260, "question": [2], "answer": [3]}, "probe 1 has 262 tokens, but the model reads at most 256"),
    ({"context": "x", "question": [2], "answer": [3]}, "context is text, but the model folder has no tokenizer"),
    ({"context": [1, True], "question": [2], "answer": [3]}, "context: .* text or a list of token ids expected"),
    ([1], r"\[1\] given, .context, question, answer. expected")])
def test_a_bad_line_is_named(line, said, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(line))
    with pytest.raises(LlmoptError, match=said) as caught:
        given(str(file), tiny.make("llama").config)
    assert "p.jsonl" in str(caught.value)


def test_a_missing_file_and_a_wrong_source_are_one_line():
    with pytest.raises(LlmoptError, match="none.jsonl.*there is no such file"):
        given("none.jsonl", tiny.make("llama").config)
    with pytest.raises(LlmoptError, match="probe: 'words' given, world, tokens or a FILE.jsonl expected"):
        Retrieval(probe="words")


def test_a_recipe_needs_no_calibration_data_for_probes(tmp_path, monkeypatch):
    """A score of probes decides the cache; another file of probes is another run."""
    monkeypatch.setitem(parts._REGISTRY["method"], "heads.toy", Retrieval)
    model, _ = llmopt.load("llmopt/reference")
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(LINES[0]))
    steps = (f"[heads.toy: {{probe: {file}}}, "
             "kv.snapkv: {ratio: 0.5, allocate: heads, heads: heads.toy}]")
    made = recipe.parse(f"data: {{name: text, path: {tmp_path / 'absent.txt'}}}\nsteps: {steps}", "t")
    report = pipeline.run(made, tmp_path / "out")
    pipeline.run(made, tmp_path / "streamed", streaming=Streaming(True))         # block by block: it needs no more
    assert contents(tmp_path / "streamed") == contents(tmp_path / "out")
    assert report.records[0]["meta"]["samples"] == 1 and len(report.records[1]["meta"]["shares"]) == len(blocks(model))
    assert is_finished(tmp_path / "out", made)
    file.write_text(json.dumps(LINES[1]))
    with pytest.raises(LlmoptError, match=r"steps read.*p\.jsonl"):
        is_finished(tmp_path / "out", made)
    with pytest.raises(LlmoptError, match="t:1: heads.toy: probe: 'x' given"):
        recipe.parse("steps: [heads.toy: {probe: x}]", "t")
