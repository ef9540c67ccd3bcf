"""Half-quadratic turns: shrinkage, one turn by hand, and never more error than rounding to nearest."""
import pytest
import torch
from torch import tensor

from llmopt.method import Run
from llmopt.quant import HQQ, Weights
from llmopt.quant.grid import Spec
from llmopt.quant.hqq import HalfQuadratic, shrunk
from tests.quant.quant_data import logits
from tests.tiny import make

CONTRACT = {"bits": 3, "group_size": 16}


def test_small_errors_vanish_and_large_ones_stay():
    assert shrunk(tensor([0.1, -0.5, 0.0]), 1.0, 5.0).tolist() == pytest.approx([0, -0.3, 0])
    assert shrunk(tensor([0.25, -0.16]), 0.5, 10.0).tolist() == pytest.approx([0.25 - 2 / 10, 0])      # .16 - 2.5 / 10


def test_a_turn_moves_the_scale_to_what_is_left():
    """Codes -1 1 2 of weights .6 apart; then a weight far out, whose error is E's and not the scale's."""
    spec = Spec(3)
    scale, zero = HalfQuadratic().turn(tensor([[-0.6, 0.6, 1.2]]), (tensor([[0.5]]), None), 1.0, spec)
    assert zero is None and scale.item() == pytest.approx((0.6 + 0.6 + 2.4) / 6)
    far = tensor([[-1.0, 1.0, 8.0]])                             # 8 is cut to code 3, 5 steps short
    scale, _ = HalfQuadratic(power=1.0).turn(far, (tensor([[1.0]]), None), 10.0, spec)
    assert scale.item() == pytest.approx((1 + 1 + 3 * (8 - (5 - 0.1))) / 11)
    assert (far * tensor([-1.0, 1, 3])).sum() / 11 > 2          # where least squares alone would put it


def test_a_turn_moves_the_zero_point_by_the_mean_of_what_is_left():
    """Codes 1 1 1, the largest there are, of 1.4 1.4 2.4: they lack .4 .4 1.4, in the mean .73."""
    spec = Spec(2, symmetric=False)
    start = tensor([[1.0]]), tensor([[0]], dtype=torch.int8)
    _, zero = HalfQuadratic(beta=1e-3).turn(tensor([[1.4, 1.4, 2.4]]), start, 1e-3, spec)
    assert zero.tolist() == [[-1]] and zero.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (3, 8), (4, 8)])
def test_never_more_error_than_where_it_begins_and_mostly_less(bits, group_size, symmetric, dtype):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(bits)).mul_(0.03).to(dtype).float()
    spec = Spec(bits, group_size, symmetric, True, dtype)

    def error(**fields):
        made = HalfQuadratic(**fields).quantize(weight.clone(), None, spec)
        return (made.dequantize(dtype).float() - weight).unflatten(1, (-1, spec.width(48))).square().sum(-1)

    begun, ours = error(iterations=0), error()
    assert (ours <= begun * (1 + 1e-5)).all() and ours.sum() < 0.995 * begun.sum()
    unsigned = HalfQuadratic(signed=False).quantize(weight.clone(), None, spec)
    assert (unsigned.scales > 0).all()


def test_rows_do_not_see_each_other():
    weight = torch.randn(700, 96, generator=torch.Generator().manual_seed(1))       # more than are searched at a time
    spec = Spec(3, 32, True, True)
    whole = HalfQuadratic().quantize(weight.clone(), None, spec)
    part = HalfQuadratic().quantize(weight[651:].clone(), None, spec)
    assert torch.equal(part.codes, whole.codes[651:]) and torch.equal(part.scales, whole.scales[651:])


def test_without_turns_it_is_rounding_to_nearest_and_a_step_needs_no_data():
    one, two = make("llama"), make("llama")
    HQQ(iterations=0, signed=False, **CONTRACT).apply(one, Run())
    Weights(**CONTRACT).apply(two, Run())
    assert torch.equal(logits(one), logits(two))
