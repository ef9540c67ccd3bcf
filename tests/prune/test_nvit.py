"""prune.nvit: cuts by importance and time, by hand; tables of times, measured and in between."""
import pytest
import torch

from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Fisher, NViT, latency
from llmopt.prune.allocate import Units
from llmopt.prune.latency import Shape, measured, shape_of, table
from llmopt.prune.nvit import ranked
from tests import tiny

CONTRACT = {"ratio": 0.5, "scope": "local"}         # some architectures keep their layers alike


def units(layer, kind, scores, cost, floor=1, step=1, prices=None):
    scores = torch.tensor(scores)
    allowed = tuple(range(len(scores), floor - 1, -step))
    return Units(layer, kind, scores, cost, allowed, torch.arange(len(scores))[:, None], prices)


def given():
    """80 in all; scores sum to 20."""
    return [units(0, "ffn", [1.0, 0.5, 2.0, 4.0], 5), units(0, "kv_groups", [3.0, 1.5], 20),
            units(1, "ffn", [0.25, 5.0, 2.25, 0.5], 5)]


def test_cuts_by_hand():
    assert ranked(given(), 0, None) == ranked(given(), 0.062, None) == [0, 0, 0]
    # without time: .25, .5, .5, 1, and then 1.5 of a KV group
    assert ranked(given(), 0.25, 0.0) == [2, 0, 2]
    assert ranked(given(), 0.5, 0.0) == [2, 1, 2]
    # time alone: the KV group saves most
    assert ranked(given(), 0.25, 1e6) == ranked(given(), 0.3, 1e6) == [0, 1, 0]
    # by score for the time: .25 / 5, 1.5 / 20, .5 / 5, .5 / 5, 1 / 5
    assert ranked(given(), 0.0625, None) == [0, 0, 1]
    assert ranked(given(), 0.3125, None) == [0, 1, 1]
    # shares of 20 and of 80: .0125, .025, .025 and .05 less .0625 eta, the group .075 less .25 eta
    assert ranked(given(), 0.25, 0.1) == [2, 0, 2]
    assert ranked(given(), 0.4375, 0.2) == [1, 1, 2]
    assert ranked(given(), 0.3125, 0.3) == [0, 1, 1]


def test_floors_and_chunks_hold_and_a_dead_unit_leaves_first():
    found = ranked([units(0, "ffn", [1.0, 1, 1, 1], 5, floor=3), units(1, "ffn", [9.0, 9, 9, 9], 5, step=2)], 0.9, None)
    assert found == [1, 2]
    assert ranked([units(0, "ffn", [3.0, 0.0, 1.0], 5), units(1, "kv_groups", [0.1, 7.0], 50)], 0.05, 0.0) == [1, 0]
    assert ranked([units(0, "ffn", [0.0, 0.0], 5)], 0.5, None) == [1]              # nothing has a score


def test_what_a_unit_saves_is_read_off_again_after_each():
    flat = units(0, "ffn", [1.0, 1.0, 1.0, 1.0], 5, prices=(40, 20, 19, 18))        # the first one saves most
    even = units(1, "ffn", [3.0, 3.0, 3.0, 3.0], 5, prices=(40, 30, 20, 10))
    assert ranked([flat, even], 0.5, None) == [1, 2]


def test_a_table_is_linear_between_its_points_and_rises():
    asked = []

    def cost(counts):
        asked.extend(counts)
        return [float(count * 10 if count != 6 else 90) for count in counts]

    found = table(tuple(range(10, 1, -1)), cost)
    assert asked == [2, 4, 6, 8, 10]
    rise = 0.01 * 80 / 8
    assert found[::-1] == (20, 30, 40, 65, 90, round(90 + rise), round(90 + 2 * rise), 95, 100)
    assert table((3,), lambda counts: [7.0] * len(counts)) == (7,)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts_of_every_width_can_be_timed(family, monkeypatch):
    monkeypatch.setattr(latency, "TOKENS", 8)
    block = blocks(tiny.make(family))[0]
    assert shape_of(block, "ffn") == Shape("ffn", 64, 2 if family == "llama" else 1, *((2, 2, 16) if family == "llama"
                                                                                      else (1, 4, 16)))
    for kind, count in (("ffn", 7), ("kv_groups", 1), ("q_heads", 1)):
        for phase, tokens in (("prefill", 8), ("decode", 1)):
            assert shape_of(block, kind).run(count, phase, torch.zeros(0))().shape == (tokens, 64)


def test_measured_times_are_the_budget(monkeypatch):
    model, run = tiny.make("llama"), Run(batches=[{"input_ids": tiny.ids(4, 24),
                                                   "attention_mask": torch.ones(4, 24, dtype=torch.long)}])
    work = []
    monkeypatch.setattr(latency, "fastest", lambda works: work.append(len(works)) or [
        1000.0 * (number + 1) for number in range(len(works))])
    method = NViT(ratio=0.3, scope={"nvit": {"latency": "decode"}}, refit=False)
    record = method.apply(model, run)
    before, after = record.meta["nanoseconds"]
    assert 0.5 < after / before <= 1 and before == 3 * (5000 + 2000) and work == [5, 2]     # layers are alike
    assert before - after <= 0.3 * before
    some = [units(0, "ffn", [1.0] * 96, 5, floor=5)]
    assert measured(tiny.make("llama"), some, "prefill", torch.device("cpu"))[0][0] == 5000


def test_its_importance_is_fishers():
    model, run = tiny.make("llama"), Run(batches=[{"input_ids": tiny.ids(4, 24),
                                                   "attention_mask": torch.ones(4, 24, dtype=torch.long)}])
    for over in ("sequence", "batch"):
        for one, two in zip(NViT(over=over).rate_all(model, run), Fisher(over=over).rate_all(model, run), strict=True):
            assert torch.equal(one["ffn"], two["ffn"])
    found, _ = NViT(ratio=0.2).plan(model, run)
    other, _ = Fisher(ratio=0.2, scope="nvit").plan(model, run)
    assert [layer.to_dict() for layer in found] == [layer.to_dict() for layer in other]
