import pytest
import torch

from llmopt.model.codes import Quantized
from llmopt.quant.grid import Spec, fit_groups, round_to_nearest


def test_symmetric_by_hand():
    result = round_to_nearest(torch.tensor([[3.5, 1.2, -0.4, -3.5], [0.0, 0.0, 0.0, 0.0]]), Spec(3))   # s = 7 / 7
    assert result.scales[0].tolist() == [1.0]
    assert result.codes.tolist() == [[3, 1, 0, -4], [0, 0, 0, 0]]
    assert result.dequantize(torch.float32).tolist() == [[3, 1, 0, -4], [0, 0, 0, 0]]


def test_asymmetric_by_hand():
    result = round_to_nearest(torch.tensor([[-1.0, 0.0, 2.0, 0.9]]), Spec(2, symmetric=False))         # s = 3 / 3
    assert result.scales.tolist() == [[1.0]] and result.zeros.tolist() == [[-1]]
    assert result.dequantize(torch.float32).tolist() == [[-1.0, 0.0, 2.0, 1.0]]


def test_asymmetric_keeps_zero_for_one_sided_rows():
    weight = torch.rand(4, 16) + 5
    weight[:, 0] = 0
    assert (round_to_nearest(weight, Spec(4, symmetric=False)).dequantize(torch.float32)[:, 0] == 0).all()


def test_eight_bits_asymmetric_do_not_wrap():
    weight = torch.linspace(-3, 10, 256).reshape(1, -1)
    value = round_to_nearest(weight, Spec(8, symmetric=False)).dequantize(torch.float32)
    assert (value - weight).abs().max() <= 13 / 255 / 2 + 1e-5


def test_clip_lowers_the_error_of_every_row():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    wide, clipped = (round_to_nearest(weight, Spec(3, clip=c)).dequantize(torch.float32) for c in (False, True))
    errors = [(value - weight).abs().pow(2.4).sum(1) for value in (clipped, wide)]
    assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.75 * errors[1].sum()


def test_sixteen_bits_change_almost_nothing():
    weight = torch.randn(16, 64)
    assert (round_to_nearest(weight, Spec(16)).dequantize(torch.float32) - weight).abs().max() <= 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_chosen_after_the_scale_was_rounded(dtype):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    result = round_to_nearest(weight, Spec(8, 16, dtype=dtype))
    scale = result.scales.float().repeat_interleave(16, 1)
    assert result.scales.dtype == dtype
    assert torch.equal(result.codes.float(), (weight / scale).round().clamp(-128, 127))


def test_groups_have_their_own_scales():
    weight = torch.cat([torch.ones(2, 4), 10 * torch.ones(2, 4)], 1)
    scales, _ = fit_groups(weight, Spec(4, 4))
    assert torch.allclose(scales, torch.tensor([[2 / 15, 20 / 15]]).expand(2, 2))


def test_scattered_groups_dequantize_by_column():
    result = Quantized(torch.ones(1, 4, dtype=torch.int8), torch.tensor([[1.0, 3.0]]), 4, 2,
                       groups=torch.tensor([1, 0, 0, 1]))
    assert result.dequantize(torch.float32).tolist() == [[3.0, 1.0, 1.0, 3.0]]
