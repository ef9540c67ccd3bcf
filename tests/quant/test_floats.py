"""Small floats: the nearest number and scale by hand, and the values that compressed-tensors makes of them."""
import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from llmopt.calibration.inputs import Moments
from llmopt.model.forms import FORMS
from llmopt.quant import floats
from llmopt.quant.gptq import ColumnSweep
from llmopt.quant.grid import Spec, fit_groups, round_to_nearest

GRIDS = {"fp8": -1, "fp8 tensor": -1, "fp8 block": 128, "nvfp4": 16, "mxfp4": 32, "mxfp8": 32}


def spec(name: str, weight: torch.Tensor, **more) -> Spec:
    whole = floats.whole(float(weight.abs().max())) if name == "nvfp4" else 1.0
    return Spec(4 if FORMS[name].halves else 8, GRIDS[name], form=FORMS[name], whole=whole, **more)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_nearest_numbers_are_those_of_the_formats():
    x = torch.cat([torch.linspace(-7, 7, 2001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    assert torch.equal(FORMS["nvfp4"].nearest(x.clone()), cast_to_fp4(x.clone()).clamp(-6, 6) + 0.0)
    large = 100 * x
    assert torch.equal(FORMS["fp8"].nearest(large.clone()), large.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_scales_by_hand():
    weight = torch.zeros(2, 32)
    weight[0, :3], weight[1, 0] = torch.tensor([6.0, -1.5, 0.3]), 7.0
    power = round_to_nearest(weight, spec("mxfp4", weight))                     # 7 has the exponent of 8
    assert power.scales.tolist() == [[1.0], [2.0]]
    assert power.dequantize(torch.float32)[:, :3].tolist() == [[6.0, -1.5, 0.5], [8.0, 0.0, 0.0]]
    both = round_to_nearest(weight, spec("nvfp4", weight))
    assert both.whole == 384 and (both.scales * both.whole).tolist() == [[384.0, LEAST], [448.0, LEAST]]
    assert fit_groups(weight, spec("fp8 tensor", weight))[0].tolist() == [[7 / 448]] * 2
    rows = torch.cat([normal(128, 128), 3 * normal(72, 128)])
    scales = fit_groups(rows, spec("fp8 block", rows))[0]
    assert scales.shape == (200, 1) and len(scales[:128].unique()) == len(scales[128:].unique()) == 1


LEAST = 2.0 ** -9       # of the e4m3 numbers above 0: a group of zeros needs some scale


@pytest.mark.parametrize(("name", "share"), [("nvfp4", 0.95), ("mxfp4", 0.999)])
def test_the_sweep_of_scales_never_makes_a_group_worse(name, share):
    weight = normal(64, 256) ** 3
    wide, swept = (round_to_nearest(weight, spec(name, weight, clip=clip)).dequantize(torch.float32)
                   for clip in (False, True))
    errors = [(value - weight).abs().pow(2.4).unflatten(1, (-1, GRIDS[name])).sum(-1) for value in (swept, wide)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < share * errors[1].sum()


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_sweeps_on_every_grid(name):
    """The outputs lose less than by rounding, and what is kept is what the sweep saw."""
    weight, x = normal(24, 128), normal(512, 128) @ normal(128, 128)
    moments = Moments()
    moments.add(x)
    moments.join(weight)
    grid = spec(name, weight, clip=True, dtype=torch.bfloat16)
    solved, rounded = ColumnSweep().quantize(weight.clone(), moments, grid), round_to_nearest(weight, grid)
    lost = [((made.dequantize(torch.bfloat16).float() - weight) @ x.T).square().sum() for made in (solved, rounded)]
    assert lost[0] < 0.8 * lost[1] and solved.codes.dtype == torch.int8 and solved.form is FORMS[name]
    assert solved.figures["loss"] == pytest.approx(float(lost[0]) / len(x), rel=1e-3)
