"""Allocation: hand-computed counts, exact sums, floors and caps, on plain arrays."""
import pytest
import torch
from torch import tensor

from llmopt.errors import BudgetError
from llmopt.kv import allocate


def test_water_fill_hand_computed():
    assert allocate.water_fill(tensor([[3., 1.], [0., 0.]]), total=12, floor=1, cap=6).tolist() == [[6, 4], [1, 1]]
    assert allocate.water_fill(tensor([[1., 1.], [1., 1.]]), total=10, floor=0, cap=9).tolist() == [[3, 3], [2, 2]]
    assert allocate.water_fill(tensor([[0., 0.]]), total=5, floor=1, cap=9).tolist() == [[3, 2]]
    assert allocate.water_fill(tensor([[5., 0., 0.]]), total=10, floor=1, cap=4).tolist() == [[4, 3, 3]]
    assert allocate.water_fill(tensor([[1., 2.]]), 9, 0, tensor([[9, 4]])).tolist() == [[5, 4]]


@pytest.mark.parametrize("total", [3, 100])
def test_water_fill_refuses_what_cannot_be_met(total):
    with pytest.raises(BudgetError, match=f"{total} entries"):
        allocate.water_fill(torch.ones(2, 2), total=total, floor=1, cap=20)


@pytest.mark.parametrize("seed", range(30))
def test_every_allocation_is_exact_and_within_bounds(seed):
    g = torch.Generator().manual_seed(seed)
    layers, heads, length = 4, 3, 50
    cap = torch.randint(0, length + 1, (layers, heads), generator=g)
    scores = torch.rand(layers, heads, length, generator=g)
    scores[torch.arange(length) >= cap.unsqueeze(-1)] = -torch.inf
    share = int(torch.randint(1, length, (), generator=g))
    floor = cap.clamp(max=min(share, 7))
    even = torch.full_like(cap, share)
    even[0] = torch.minimum(even[0], cap[0].max())             # a layer that sees no more than it holds
    total = allocate.total_of(cap, even)
    weights = torch.rand(layers, heads, generator=g) ** 8
    found = {
        "global": allocate.by_threshold(scores, total, floor),
        "ada": allocate.ada(scores, even, floor, cap),
        "pyramid": allocate.pyramid(even, torch.full_like(cap, 2), floor, cap),
        "prefix": allocate.prefix(scores, total, floor, cap),
        "heads": allocate.water_fill(weights, total, floor, cap),
    }
    for name, counts in found.items():
        assert counts.dtype == torch.int64 and counts.shape == cap.shape
        of_layers = torch.minimum(cap.sum(1), even.sum(1)).sum()            # ada: what a layer lacks, no other has
        assert int(counts.sum()) == (of_layers if name == "ada" else total), name
        assert bool((counts >= floor).all() and (counts <= cap).all()), name
    assert found["ada"].sum(1).tolist() == torch.minimum(cap.sum(1), even.sum(1)).tolist()
    assert total == cap.sum() or total == even.sum() >= cap.clamp(max=share).sum()
    assert allocate.uniform(cap, share).tolist() == cap.clamp(max=share).tolist()


def test_global_takes_the_best_wherever_they_are():
    scores = tensor([[[9., 8., 7., 6.], [1., 1., 1., 1.]], [[5., 0., 0., 0.], [4., 3., 0., 0.]]])
    floor = torch.ones(2, 2, dtype=torch.int64)
    assert allocate.by_threshold(scores, total=8, floor=floor).tolist() == [[4, 1], [1, 2]]
    assert allocate.by_threshold(scores, total=4, floor=floor).tolist() == [[1, 1], [1, 1]]


def test_ada_equal_heads_are_uniform_and_unequal_ones_are_not():
    cap, floor = torch.full((1, 2), 10), torch.ones(1, 2, dtype=torch.int64)
    row = torch.arange(10.).flip(0)
    assert allocate.ada(torch.stack([row, row])[None], torch.full_like(cap, 5), floor, cap).tolist() == [[5, 5]]
    assert allocate.ada(torch.stack([row + 20, row])[None], torch.full_like(cap, 5), floor, cap).tolist() == [[9, 1]]
    assert allocate.ada(torch.stack([row + 20, row])[None], torch.full_like(cap, 10), floor, cap).tolist() == [[10, 10]]


def test_pyramid_falls_linearly():
    cap, floor = torch.full((5, 2), 100), torch.full((5, 2), 1)
    counts = allocate.pyramid(torch.full_like(cap, 30), torch.full_like(cap, 10), floor, cap)
    assert counts[:, 0].tolist() == [49, 40, 30, 20, 11]                  # 2*20 - 20/20 + 10 down to 20/20 + 10
    assert int(counts.sum()) == 5 * 2 * 30


def test_prefix_hand_computed():
    cap = torch.full((2, 1), 10)
    scores = torch.stack([torch.ones(1, 10), torch.eye(10)[:1]])
    assert allocate.prefix(scores, 11, torch.ones_like(cap), cap).tolist() == [[10], [1]]
    same = torch.rand(1, 1, 10).expand(2, 1, 10)
    assert allocate.prefix(same, 12, torch.ones_like(cap), cap).tolist() == [[6], [6]]
    spread = torch.stack([torch.ones(1, 10), torch.eye(10)[:1]])
    scaled = spread * tensor([[[1.]], [[50.]]])
    one = torch.ones_like(cap)
    assert torch.equal(allocate.prefix(spread, 8, one, cap), allocate.prefix(scaled, 8, one, cap))


def test_ties_go_to_the_older_entry():
    assert allocate.ranks(tensor([[1., 2., 2., 1.]])).tolist() == [[2, 0, 1, 3]]
