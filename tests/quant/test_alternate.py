"""Scales by least squares and codes by coordinate descent, after the sweep."""
import pytest
import torch

from llmopt.calibration.inputs import Moments
from llmopt.calibration.second_moments import row_errors
from llmopt.quant import GPTQ
from llmopt.quant.alternate import _loss, alternate, descend, refit
from llmopt.quant.grid import Spec, round_to_nearest


def given(columns: int = 24, out: int = 10, dtype: torch.dtype = torch.float32):
    """A weight, and the Hessian of inputs that share most of their variance; column 5 is never used."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, 5] = 0
    weight = torch.randn(out, columns, generator=generator)
    weight[:, 5] = 0
    return weight, x.T @ x / 100


def lost(made, weight, hessian, spec):
    return row_errors(made.dequantize(spec.dtype).float() - weight, hessian)


def test_scales_are_those_of_least_squares():
    """For fixed codes the values are s_g c: the best s of a row solves an ordinary least-squares problem."""
    weight, hessian = given()
    spec = Spec(3, 8)
    start = round_to_nearest(weight, spec)
    made = refit(start, hessian, _loss(start, weight, hessian, spec)[0], spec)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(24)).T                         # |root e|^2 = e H e
    for row in range(len(weight)):
        columns = torch.block_diag(*start.codes[row].double().view(3, 8, 1))                        # [in, groups]
        expected = torch.linalg.lstsq(root @ columns, root @ weight[row].double()).solution
        assert torch.allclose(made.scales[row].double(), expected, rtol=1e-3)
    assert torch.equal(made.codes, start.codes) and (lost(made, weight, hessian, spec) <
                                                     lost(start, weight, hessian, spec)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", [dict(bits=3, group_size=8, signed=True), dict(bits=2, group_size=-1),
                                  dict(bits=3, group_size=3, symmetric=False)])
def test_descent_ends_where_no_single_code_can_do_better(spec, dtype):
    """No row loses more than before; and after enough sweeps no change of one code by one step helps."""
    weight, hessian = given()
    spec = Spec(clip=True, dtype=dtype, **spec)
    start, order = round_to_nearest(weight, spec), hessian.diagonal().argsort(descending=True)
    made, before = start, lost(start, weight, hessian, spec)
    for _ in range(8):
        slope = _loss(made, weight, hessian, spec)[0]
        made = descend(made, hessian[order][:, order], slope[:, order], order, spec)
        after = lost(made, weight, hessian, spec)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert after.sum() < 0.8 * lost(start, weight, hessian, spec).sum() and torch.equal(made.scales, start.scales)
    for column in range(24):
        for step in (-1, 1):
            made.codes[:, column] += step
            inside = (made.codes[:, column] >= spec.low) & (made.codes[:, column] <= spec.high)
            assert (lost(made, weight, hessian, spec) >= after * (1 - 1e-3))[inside].all()
            made.codes[:, column] -= step


def test_coordinate_descent_of_white_inputs_changes_nothing():
    weight, _ = given()
    spec, order = Spec(3, 8, clip=True), torch.arange(24)
    start = round_to_nearest(weight, spec)
    made = descend(start, 2 * torch.eye(24), _loss(start, weight, 2 * torch.eye(24), spec)[0], order, spec)
    assert torch.equal(made.codes, start.codes)


@pytest.mark.parametrize("fields", [{}, {"act_order": False}, {"static_groups": False}, {"symmetric": False},
                                    {"group_size": -1}, {"group_size": 2}, {"clip": False}])
def test_turns_never_raise_the_loss_of_a_row(fields):
    weight, hessian = given()
    stats = Moments()
    stats.lower, stats.tokens = hessian.double(), 2
    step = {key: fields.pop(key) for key in list(fields) if key in ("group_size", "symmetric", "clip")}
    spec = Spec(**{"bits": 3, "group_size": 8, "clip": True, "dtype": torch.bfloat16, **step})
    made = [GPTQ(sweeps=sweeps, **fields).quantize(weight.clone(), stats, spec) for sweeps in (0, 1, 3)]
    losses = [lost(each, weight, hessian, spec) for each in made]
    assert (losses[2] <= losses[0] * (1 + 1e-3)).all() and losses[2].sum() <= losses[1].sum() < losses[0].sum()
    for each, loss in zip(made, losses, strict=True):
        assert each.scales.dtype == torch.bfloat16 and each.scales.abs().min() > 0
        assert each.figures["loss"] == pytest.approx(float(loss.sum() / 2), rel=1e-2)


def test_hopeless_rows_stay():
    """Rows of zeros have no scale to solve for; an indefinite Hessian has no least squares."""
    weight, hessian = given()
    weight[3] = 0
    spec = Spec(3, 8)
    for broken in (hessian, -hessian, torch.zeros_like(hessian)):
        made = alternate(round_to_nearest(weight, spec), weight, broken, spec, 2)
        assert made.scales.isfinite().all() and (made.dequantize(torch.float32)[3] == 0).all()
