import pytest
import torch

from llmopt.calibration.inputs import Moments
from llmopt.calibration.second_moments import row_errors
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.quant import GPTQ, RTN, gptq
from llmopt.quant.gptq import inverse_factor
from llmopt.quant.grid import Spec, fit_groups, round_to_nearest
from tests.quant.quant_data import batches, logits
from tests.tiny import make

PLAIN = {"signed": False, "search": "weights", "sweeps": 0}          # as Frantar et al. have it


def known(hessian, tokens):
    """Moments that have come to this Hessian."""
    stats = Moments()
    stats.lower, stats.tokens = hessian.double() * (tokens / 2), tokens
    return stats


def correlated(out=12, columns=24, tokens=400, seed=0):
    """A weight, and the Moments of inputs whose channels share most of their variance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix.T
    stats = Moments()
    stats.add(x)
    return torch.randn(out, columns, generator=generator), stats, x


def solve(weight, stats, spec, **fields):
    return GPTQ(**fields).quantize(weight.clone(), stats, spec)


def brute_force(weight, hessian, scale, bits):
    """Optimal Brain Quantization in column order: the inverse of what is left is made anew at each step."""
    w, q = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:].double())
        q[:, i] = (w[:, i] / scale).round().clamp(-(1 << bits - 1), (1 << bits - 1) - 1) * scale
        error = (w[:, i] - q[:, i]) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return q


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_white_inputs_give_round_to_nearest_bit_for_bit(group_size, symmetric):
    weight, _, _ = correlated()
    spec = Spec(3, group_size, symmetric, clip=True)
    result = solve(weight, known(2.5 * torch.eye(24), 100), spec, act_order=False, **PLAIN)
    assert torch.equal(result.codes, round_to_nearest(weight, spec).codes)
    assert torch.equal(result.dequantize(torch.float32), round_to_nearest(weight, spec).dequantize(torch.float32))


def test_equals_brute_force():
    weight, stats, _ = correlated()
    spec = Spec(3)
    solved = brute_force(weight, stats.hessian, fit_groups(weight, spec)[0][:, 0].double(), 3).float()
    rounded = round_to_nearest(weight, spec).dequantize(torch.float32)
    worse = row_errors(rounded - weight, stats.hessian) < row_errors(solved - weight, stats.hessian)
    result = solve(weight, stats, spec, act_order=False, damping=0.0, **PLAIN)
    assert result.figures["rounded_rows"] == worse.sum() == 1
    assert torch.allclose(result.dequantize(torch.float32), torch.where(worse[:, None], rounded, solved), atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"act_order": False}])
def test_block_size_does_not_change_the_result(fields):
    weight, stats, _ = correlated()
    codes = [solve(weight, stats, Spec(4, 8), block=block, **fields).codes for block in (1, 8, 16, 128)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_block_size_does_not_change_dynamic_groups():
    weight, stats, _ = correlated()
    first, *others = (solve(weight, stats, Spec(4, 8), act_order=False, static_groups=False, block=block, **PLAIN)
                      for block in (1, 16, 128))
    for other in others:                  # a scale's last bit may turn the tie that the largest weight always is
        assert torch.allclose(first.scales, other.scales, rtol=1e-5)
        assert ((first.codes.int() - other.codes.int()).abs() <= 1).all()
        assert (first.codes != other.codes).float().mean() < 0.03


def test_dynamic_groups_are_fitted_to_current_values():
    weight, stats, _ = correlated()
    result = solve(weight, stats, Spec(3, 8), act_order=False, static_groups=False, **PLAIN)
    stale, _ = fit_groups(weight, Spec(3, 8))
    assert torch.equal(result.scales[:, 0], stale[:, 0])             # nothing has moved yet
    assert not torch.allclose(result.scales[:, 1], stale[:, 1])      # though it lies in the same block of 128


def test_sixteen_bits_change_almost_nothing():
    weight, stats, _ = correlated()
    assert (solve(weight, stats, Spec(16)).dequantize(torch.float32) - weight).abs().max() <= 2e-4


def test_loss_is_the_output_error():
    weight, stats, _ = correlated()
    result = solve(weight, stats, Spec(3), damping=0.0)
    change = weight - result.dequantize(torch.float32)
    expected = ((change @ stats.hessian) * change).sum() / 2
    assert result.figures["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_output_error_is_far_below_round_to_nearest():
    weight, stats, x = correlated(32, 64, 1000)
    spec = Spec(3, clip=True)

    def error(result):
        return float(((result.dequantize(torch.float32) - weight) @ x.T).square().sum())

    rounded = error(round_to_nearest(weight, spec))
    assert error(solve(weight, stats, spec, act_order=False)) < 0.7 * rounded
    assert error(solve(weight, stats, spec)) < 0.7 * rounded


@pytest.mark.parametrize("group_size", [-1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["few tokens", "outliers", "dead", "twins", "tiny", "white"])
def test_no_row_is_worse_than_round_to_nearest(kind, dtype, group_size):
    """Whatever the inputs: rank-deficient, of wildly different size, absent, equal, next to nothing."""
    for seed, symmetric in enumerate((True, False, True)):
        weight, _, x = correlated(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        x = {"few tokens": x[:3], "outliers": x * (1 + 1e4 * (torch.rand(24, generator=generator) < 0.1)),
             "dead": x * (torch.rand(24, generator=generator) < 0.5), "twins": x[:, :4].repeat(1, 6),
             "tiny": 1e-12 * x, "white": torch.randn(400, 24, generator=generator)}[kind]
        stats, spec = Moments(), Spec(2 + seed, group_size, symmetric, clip=True, dtype=dtype)
        stats.add(x)
        weight *= stats.hessian.diagonal() > 0                        # neither may fit its scales to unused columns
        made = solve(weight, stats, spec, **PLAIN), round_to_nearest(weight, spec)
        values = [codes.dequantize(dtype).float() for codes in made]
        solved, rounded = (row_errors(value - weight, stats.hessian) for value in values)
        assert values[0].isfinite().all() and (solved <= rounded * (1 + 1e-3)).all()


def test_the_factor_is_made_once_for_the_weights_that_read_one_input(monkeypatch):
    made = []

    def counted(hessian, *rest):
        made.append(len(hessian))
        return inverse_factor(hessian, *rest)

    monkeypatch.setattr(gptq, "inverse_factor", counted)
    GPTQ(group_size=16).apply(make("llama"), Run(batches()))
    front = [64] + [64, 64] * 2 + [96, 96]          # the first readers miss nothing; a second one for what is missing
    assert made == front + 2 * [64, *front]


def test_dead_columns_become_zero():
    weight, _, x = correlated()
    x[:, [3, 17]] = 0
    stats = Moments()
    stats.add(x)
    result = solve(weight, stats, Spec(4, 8))
    value = result.dequantize(torch.float32)
    assert (value[:, [3, 17]] == 0).all() and value.isfinite().all() and result.figures["dead_columns"] == 2


def test_fewer_tokens_than_columns():
    weight, _, x = correlated()
    stats = Moments()
    stats.add(x[:5])
    assert solve(weight, stats, Spec(4)).dequantize(torch.float32).isfinite().all()


def test_damping_grows_until_it_works_and_then_gives_up():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.1, 1.0]))
    factor, damping = inverse_factor(indefinite, 0.01)
    assert factor is not None and damping == pytest.approx(1.0)
    hopeless = torch.diag(torch.tensor([1.0, 1.0, -50.0, 60.0]))
    assert inverse_factor(hopeless, 0.01)[0] is None
    weight, _, _ = correlated(3, 4)
    result = solve(weight, known(hopeless, 9), Spec(4))
    assert torch.equal(result.codes, round_to_nearest(weight, Spec(4)).codes)
    assert "rounded to nearest" in result.figures["note"]


def test_permuting_the_inputs_permutes_the_result():
    weight, stats, _ = correlated()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    straight = solve(weight, stats, Spec(3))
    shuffled = solve(weight[:, order], known(stats.hessian[order][:, order], 400), Spec(3))
    assert torch.equal(shuffled.codes, straight.codes[:, order])


def test_static_groups_keep_the_original_columns():
    weight, stats, _ = correlated()
    assert solve(weight, stats, Spec(4, 8)).groups is None
    assert solve(weight, stats, Spec(4, 8), static_groups=False).groups is not None
    assert solve(weight, stats, Spec(4, -1), static_groups=False).groups is None


def test_overflow_is_named():
    weight, stats, _ = correlated()
    stats.hessian[2, 2] = float("inf")
    with pytest.raises(LlmoptError, match="overflow"):
        solve(weight, stats, Spec(4))


def test_stats_are_a_running_mean():
    _, whole, x = correlated()
    parts = Moments()
    for piece in x.split([1, 150, 249]):
        parts.add(piece)
    parts.add(x[:0])
    assert torch.allclose(parts.hessian, 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5) and parts.tokens == whole.tokens
    weighted = Moments()
    weighted.add(x, torch.full((len(x),), 4.0))
    assert torch.allclose(weighted.hessian, 4 * whole.hessian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_walk_beats_round_to_nearest_on_the_inputs_it_saw(family):
    ours, theirs = make(family), make(family)
    data = batches(rows=16, length=32)
    record = GPTQ(bits=3, group_size=32).apply(ours, Run(data))
    RTN(bits=3, group_size=32).apply(theirs, Run())
    dense = make(family)
    if family != "mixtral":               # random routers send tokens elsewhere at any change at all
        assert (logits(ours) - logits(dense)).square().mean() < (logits(theirs) - logits(dense)).square().mean()
    assert all(0 < m["output_error"] < m["weight_error"] for m in record.meta["modules"].values())


def test_padding_does_not_count():
    trimmed, padded = make("llama"), make("llama")
    tokens = batches()[1]["input_ids"]
    wide = torch.cat([tokens, torch.zeros_like(tokens[:, :5])], 1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens[:, :5])], 1)
    GPTQ(bits=4, group_size=16).apply(trimmed, Run([{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]))
    GPTQ(bits=4, group_size=16).apply(padded, Run([{"input_ids": wide, "attention_mask": mask}]))
    assert torch.allclose(logits(trimmed), logits(padded), atol=1e-3)


def test_bad_fields_are_named():
    for fields in ({"damping": 2.0}, {"block": 0}):
        with pytest.raises(FieldError, match=next(iter(fields))):
            GPTQ(**fields)
