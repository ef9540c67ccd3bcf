"""Scales of either sign, searched for the outputs' error."""
import pytest
import torch

from llmopt.calibration.second_moments import row_errors
from llmopt.quant.grid import Spec, fit_groups, nearest, round_to_nearest
from llmopt.quant.search import WIDE, fit_groups_to


def inputs(columns: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(6, columns, generator=generator), x.T @ x / 300


def lost(weight, hessian, grid, spec):
    """What each group of each row loses in its own block of the Hessian, summed over the groups."""
    change = nearest(weight, grid, spec).dequantize(torch.float32) - weight
    width = spec.width(weight.shape[1])
    blocks = torch.block_diag(*[hessian[i:i + width, i:i + width] for i in range(0, len(hessian), width)])
    return row_errors(change, blocks)


def test_a_negative_scale_reaches_the_side_with_more_codes():
    """Values -3 .. 4 steps are exact with a scale of -0.5, and lie outside the grid of any positive one."""
    weight = torch.arange(4.0, -4, -1)[None] / 2
    made = nearest(weight, fit_groups_to(weight, torch.eye(8), Spec(3, -1, True, True, signed=True)), Spec(3))
    assert made.scales.tolist() == [[-0.5]] and made.codes.tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3]]
    assert torch.equal(made.dequantize(torch.float32), weight)
    assert (round_to_nearest(weight, Spec(3, -1, True, True)).dequantize(torch.float32) - weight).abs().max() > 0.1


@pytest.mark.parametrize("group_size", [-1, 6, 1])
def test_signs_never_hurt_and_often_help(group_size):
    weight, hessian = inputs(24)
    specs = [Spec(2, group_size, True, True, signed=signed) for signed in (False, True)]
    for fitted, loss in ((lambda w, spec: fit_groups(w, spec), lambda change: change.abs().pow(2.4).sum(1)),
                         (lambda w, spec: fit_groups_to(w, hessian, spec), None)):
        grids = [fitted(weight, spec) for spec in specs]
        assert (grids[0][0] > 0).all() and (grids[1][0] < 0).any()
        errors = [lost(weight, hessian, grid, spec) if loss is None else
                  loss(nearest(weight, grid, spec).dequantize(torch.float32) - weight)
                  for grid, spec in zip(grids, specs, strict=True)]
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_in_the_outputs_loses_less_there(symmetric):
    weight, hessian = inputs(24)
    spec = Spec(3, 8, symmetric, True, torch.bfloat16)
    ours, theirs = (lost(weight, hessian, grid, spec) for grid in
                    (fit_groups_to(weight, hessian, spec), fit_groups(weight, spec)))
    assert ours.sum() < 0.95 * theirs.sum()
    absmax = Spec(3, 8, symmetric, False, torch.bfloat16)
    assert torch.equal(fit_groups_to(weight, hessian, absmax)[0], fit_groups(weight, absmax)[0])    # clip: false


def test_rows_and_groups_may_be_searched_in_parts():
    """Of 700 x 96 weights, 65,536 at a time: each group finds the scale that it finds alone."""
    weight, hessian = torch.randn(700, 96, generator=torch.Generator().manual_seed(1)), inputs(96)[1]
    spec = Spec(4, 32, True, True, signed=True)
    scales, _ = fit_groups_to(weight, hessian, spec)
    last, _ = fit_groups_to(weight[-9:, 64:], hessian[64:, 64:], spec)
    assert scales.shape == (700, 3) and torch.allclose(scales[-9:, 2:], last, rtol=1e-3)


def test_the_widest_groups_count_the_diagonal_alone():
    weight, hessian = torch.randn(2, WIDE + 8), torch.eye(WIDE + 8)
    spec = Spec(3, -1, True, True)
    beside = hessian + (1 - hessian)
    assert torch.equal(fit_groups_to(weight, hessian, spec)[0], fit_groups_to(weight, beside, spec)[0])
