"""Weights on their grids as functions with slopes, and the way down that they go."""
import math

import pytest
import torch

from llmopt.calibration.descent import Course, Knobs, descend
from llmopt.model.weights import Projection
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.latent import Following, Held
from llmopt.quant.start import Start

SPECS = [Spec(3, 8, signed=True, clip=True, scale_dtype=torch.float16), Spec(2, -1), Spec(4, 8, symmetric=False),
         Spec(3, 8, dtype=torch.bfloat16, clip=True, signed=True), Spec(3, 8, symmetric=False, dtype=torch.bfloat16)]


def start(spec: Spec) -> Start:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    codes = round_to_nearest(weight, spec)
    scale = codes.scales.float().repeat_interleave(16 // codes.scales.shape[1], 1)
    slack = (weight - codes.dequantize(spec.dtype).float()) / scale
    return Start(Projection("x", torch.nn.Linear(16, 6, dtype=spec.dtype)), spec, codes, slack)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [Held, Following])
def test_a_weight_begins_as_its_codes_and_is_what_a_loader_makes_of_it(kind, spec):
    latent = kind(start(spec))
    made = latent.result()
    assert torch.equal(made.codes, latent.codes.codes) and torch.equal(made.scales, latent.codes.scales)
    assert (made.zeros is None) == spec.symmetric and (spec.symmetric or torch.equal(made.zeros, latent.codes.zeros))
    generator = torch.Generator().manual_seed(2)
    names = ("offset", "factor") if kind is Held else ("offset", "alpha", "beta")
    for name in names:
        number = getattr(latent, name)
        number.add_(torch.randn(number.shape, generator=generator), alpha=0.2).requires_grad_()
    moved = latent.result()
    assert torch.equal(moved.dequantize(spec.dtype), latent.value()) and moved.figures["moved_codes"] > 0
    assert moved.codes.amin() >= spec.low and moved.codes.amax() <= spec.high
    assert moved.scales.dtype == spec.stored and not torch.equal(moved.scales, made.scales)


def test_slopes_pass_straight_through_the_rounding():
    """Of a code its scale, 0 where it is cut; of a scale that is multiplied by 1 + a the value, at a = 0."""
    latent = Held(start(SPECS[0]))
    latent.offset.requires_grad_(), latent.factor.requires_grad_()
    before = latent.value().detach()
    by_code, by_scale = torch.autograd.grad(latent.value().sum(), (latent.offset, latent.factor))
    place = latent.middle.flatten(1)
    inside = (place >= -4) & (place <= 3)
    assert torch.equal(by_code, latent.codes.scales.float().repeat_interleave(8, 1) * inside) and not inside.all()
    assert torch.allclose(by_scale, before.unflatten(1, (2, 8)).sum(-1), rtol=1e-5)


def test_a_scale_that_turns_round_or_vanishes_is_not_taken():
    latent = Held(start(SPECS[0]))
    latent.factor += torch.tensor([-1.0, -2.0])
    assert torch.equal(latent.result().scales, latent.codes.scales)


def bowl(*numbers: torch.Tensor):
    return lambda index: sum((number - (1 + index)).square().sum() for number in numbers)


def test_descent_finds_the_bottom_and_stays_within_reach():
    free, bound, still = torch.zeros(3), torch.zeros(2), torch.zeros(1)
    knobs = [Knobs([free], 0.1), Knobs([bound], 0.1, reach=0.5), Knobs([still], 0.0)]
    first, last = descend(bowl(free, bound), [0, 1], [0, 1], knobs, Course(200, signs=False))
    assert torch.allclose(free, torch.full((3,), 1.5), atol=0.05) and torch.equal(bound, torch.full((2,), 0.5))
    assert first == 25 and last < 8 and torch.equal(still, torch.zeros(1)) and not free.isnan().any()


def test_signs_take_steps_of_the_rate_that_falls_evenly():
    number = torch.zeros(1)
    descend(lambda index: (number - 9).square().sum() * 1e-6, [0], [0], [Knobs([number], 0.5)], Course(4, signs=True))
    assert number.item() == pytest.approx(0.5 * (1 + 0.75 + 0.5 + 0.25))


def test_the_best_state_is_kept_and_no_step_begins_too_late():
    number, looks = torch.ones(1), []
    assert descend(bowl(number), [0], [0], [Knobs([number], 50.0)], Course(5, signs=False)) == (0, 0)
    assert number.item() == 1

    def late():
        looks.append(1)
        return len(looks) > 3

    number = torch.zeros(1)
    _, loss = descend(bowl(number), [0], [0], [Knobs([number], 0.1)], Course(1000, signs=True, late=late))
    assert number.item() == pytest.approx(0.3, abs=0.01) and loss == pytest.approx((1 - number.item()) ** 2)
    assert Course(4, signs=False).share(2) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
