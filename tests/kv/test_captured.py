"""Budgets from captured replay mass: the majorant, the steepest first, and a head whose order finds nothing."""
import pytest
import torch
from torch.testing import assert_close

from llmopt import runtime
from llmopt.heads.replay import Replay, slid
from llmopt.kv import SnapKV
from llmopt.kv.captured import KEPT, PLACES, Captured, best, captured, falling
from llmopt.method import Replayed, Run
from tests.tiny import ids, make


def test_the_majorant_pools_what_rises():
    even = torch.ones(4)
    assert falling(torch.tensor([4., 1., 3., 0.]), even).tolist() == [4, 2, 2, 0]
    assert falling(torch.tensor([0., 0., 0., 4.]), even).tolist() == [1, 1, 1, 1]
    assert falling(torch.tensor([1., 4.]), torch.tensor([3., 1.])).tolist() == [1.75, 1.75]


def test_mass_in_the_scorer_s_own_order():
    replay, own = torch.rand(2, 70), torch.rand(2, 70)
    own[0] = replay[0]                                                  # finds the best first; the other by chance
    curves = captured(Replayed(torch.arange(70), [replay[:1], replay[1:]], (4, 2), [0, 0]), [own[:1], own[1:]])
    assert curves.shape == (2, len(PLACES)) and bool((curves[:, 0] == 0).all())
    assert_close(curves[:, -1], replay[:, 4:68].double().sum(1))
    middle = int((PLACES * 64).round().tolist().index(16.0))
    assert_close(curves[0, middle], replay[0, 4:68].sort(descending=True).values[:16].double().sum())
    assert float(curves[0, middle]) > float(curves[1, middle])


def test_entries_go_where_the_slope_is_steepest():
    steep = torch.where(PLACES[1:] <= 0.26, 10.0, 0.0)
    slopes = torch.stack([steep, torch.ones_like(steep)])
    for share in KEPT:
        parts = best(slopes, torch.tensor([50, 50]), share)
        assert_close(parts.sum(), torch.tensor(2 * share, dtype=torch.float64))
    first = PLACES[PLACES <= 0.26][-1]
    assert_close(best(slopes, torch.tensor([50, 50]), 0.25)[0], first)
    assert float(best(slopes, torch.tensor([50, 50]), 0.1)[1]) == 0
    few = best(torch.ones_like(slopes), torch.tensor([10, 90]), 0.1)       # of ten, one is worth a tenth, not a 90th
    assert_close(few, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert best(torch.ones_like(slopes), torch.tensor([0, 90]), 0.3).tolist() == pytest.approx([0.3, 0.3])


def test_a_plan_of_a_real_cache_sums_up():
    model = make("llama")
    run = Run([{"input_ids": ids(3, 80), "attention_mask": torch.ones(3, 80, dtype=torch.long)}])
    Replay(pieces=3, length=80, chunk=40, sinks=1, window=4).apply(model, run)
    record = SnapKV(ratio=0.5, window=4, allocate="captured").plan(model, run)
    for share, parts in zip(record.meta["kept"], record.meta["parts"], strict=True):
        assert abs(sum(map(sum, parts)) / 6 - share) < 1e-6


def one_sliding():
    """A model of three layers, of which the second sees the last 33 tokens."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return make("gemma3_text", sliding_window=33, layer_types=kinds)


@pytest.mark.parametrize(("worth", "inside"), [(2.0, 1.0), (0.0, 0.0)])
@torch.no_grad()
def test_a_sliding_layer_takes_part_with_what_its_window_holds(worth, inside):
    """Two heads of six see 32 tokens back; an entry is worth 1, there `worth`: they keep all of theirs, or none."""
    model = one_sliding()
    mass = [torch.ones(2, 72), worth * (torch.arange(72) >= 40).expand(2, -1), torch.ones(2, 72)]
    piece = Replayed(ids(1, 72)[0], mass, (4, 4), slid(model, 72))
    assert piece.slid == [0, 40, 0] and piece.sizes().tolist() == [64, 64, 28, 28, 64, 64]
    run = Run(replays=[piece])
    record = SnapKV(ratio=0.5, window=4, allocate="captured").plan(model, run)
    for share, parts in zip(record.meta["kept"], record.meta["parts"], strict=True):
        entries = torch.tensor(parts).flatten() * piece.sizes()
        there = min(312 * share, 56) if inside else max(0, 312 * share - 256)            # of 312 entries in all
        assert_close(entries.view(3, 2).sum(1)[[1, 0, 2]].cumsum(0)[[0, 2]], torch.tensor([there, 312 * share]))
    for length, budget in ((72, 29), (144, 50)):                 # a longer text: the others have more, the window not
        with runtime.attached(model, SnapKV(budget=budget, window=4, allocate="captured"), run=run):
            kept = torch.stack([layer[0] for layer in model(ids(1, length), use_cache=True).past_key_values.kept()])
        assert int(kept.sum()) == 4 * budget + 2 * min(budget, 32)
        assert kept[1].tolist() == ([32, 32] if inside else [4, 4])                      # the last 4; sinks are gone


@torch.no_grad()
def test_a_head_keeps_its_part_of_what_its_layer_has_in_sight(monkeypatch):
    """Half of all that may go: of 136 entries of a text of 144 tokens, of 28 in a window of 32 whose sinks are gone."""
    model = one_sliding()
    monkeypatch.setattr(Captured, "plan", lambda *given: {"kept": [0.1, 0.5], "parts": [
        [[0.1, 0.1]] * 3, [[0.5, 0.5]] * 3]})
    with runtime.attached(model, SnapKV(budget=69, window=4, allocate="captured")):
        kept = torch.stack([layer[0] for layer in model(ids(1, 144), use_cache=True).past_key_values.kept()])
    assert kept.tolist() == [[76, 76], [18, 18], [76, 76]] and int(kept.sum()) == 4 * 69 + 2 * 32
