"""What a set of choices costs: measured as KL to the dense model, undone afterwards; a choice may be anything."""
import copy

import pytest
import torch

from llmopt.calibration.trial import Trial, sample
from llmopt.model.blocks import blocks
from tests import tiny
from tests.test_walk import batches


def halved(projection):
    less = projection.weight * 0.5
    return projection, lambda: less


def zeroed(projection):
    return projection, lambda: torch.zeros_like(projection.weight)


@torch.no_grad()
def divergence(dense, model, rows) -> float:
    total = [torch.nn.functional.kl_div(model(**row).logits.log_softmax(-1), dense(**row).logits.log_softmax(-1),
                                        log_target=True, reduction="none").sum(-1) for row in rows]
    return float(torch.cat(total, 1).mean())


def test_choices_that_are_no_bits():
    """A unit drops its writer, halves one of two weights, or stays: each is a choice by any name."""
    model, dense = tiny.make("llama"), tiny.make("llama")
    ffn, attention = blocks(model)[1].ffn_out, blocks(model)[1].attn_out
    up = blocks(model)[2].part("up")[0]
    rows = sample(batches(), 0, tiny.VOCABULARY)
    trial = Trial(model, rows, {
        "a": {"whole": [], "narrow": [halved(ffn)], ("gone", 1): [zeroed(ffn), zeroed(attention)]},
        "b": {0.0: [], 0.5: [halved(up)]}})
    assert trial.of({"a": "whole", "b": 0.0}) == pytest.approx(0, abs=1e-9)
    by_hand = tiny.make("llama")
    halved_up, gone = blocks(by_hand)[2].part("up")[0], (blocks(by_hand)[1].ffn_out, blocks(by_hand)[1].attn_out)
    halved_up.write(halved_up.weight * 0.5)
    assert trial.of({"b": 0.5}) == pytest.approx(divergence(dense, by_hand, rows), rel=1e-3)
    for projection in gone:
        projection.write(torch.zeros_like(projection.weight))
    assert trial.of({"a": ("gone", 1)}) == pytest.approx(divergence(dense, by_hand, rows), rel=1e-3)   # b stays at 0.5
    assert trial.of({"a": "narrow", "b": 0.0}) < trial.of({"a": ("gone", 1), "b": 0.5})
    assert torch.equal(attention.weight, blocks(dense)[1].attn_out.weight) is False
    trial.of({"a": "narrow"})                             # what this choice leaves alone is dense again
    assert torch.equal(attention.weight, blocks(dense)[1].attn_out.weight)
    trial.restore()
    before = copy.deepcopy(dense.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_are_drawn_by_seed_without_their_padding():
    rows = sample(batches(), 3, tiny.VOCABULARY)
    assert sorted(row["input_ids"].shape[1] for row in rows) == [17, 24, 24, 24]
    assert all(bool(row["attention_mask"].all()) for row in rows)
    again, other = sample(batches(), 3, tiny.VOCABULARY), sample(batches(), 4, tiny.VOCABULARY)
    same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True)]
    assert all(same) and [r["input_ids"].tolist() for r in rows] != [r["input_ids"].tolist() for r in other]
    assert len(sample(batches(), 3, 1 << 27)) == 1        # a vocabulary that leaves room for one row alone
