import itertools

import pytest
import torch
from torch import tensor

from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.method import Run
from llmopt.quant import GPTQ, RTN, measured
from llmopt.quant.allocate import around, two_level
from llmopt.quant.plan import average_bits
from llmopt.quant.scores import alignment, lim, share_above
from tests.quant.quant_data import batches, logits
from tests.tiny import make


def mean(bits, params):
    return sum(b * n for b, n in zip(bits, params, strict=True)) / sum(params)


def test_two_level_by_hand():
    assert two_level([0.9, 0.1, 0.5, 0.3], [1] * 4, 4, 2, 3.0) == [4, 2, 4, 2]
    assert two_level(list(range(40)), [7] * 40, 4, 2, 3.5) == [2] * 10 + [4] * 30      # the paper's 30 + 10
    assert two_level([1.0] * 4, [1] * 4, 4, 2, 3.4) == [2, 2, 4, 4]                    # ties: the index; at most 3.4


def test_two_level_limits():
    assert two_level([1, 2, 3], [1] * 3, 8, 4, 9.0) == [8, 8, 8]
    assert two_level([1, 2, 3], [1] * 3, 8, 4, 4.0) == [4, 4, 4]
    with pytest.raises(BudgetError):
        two_level([1, 2, 3], [1] * 3, 8, 4, 3.9)
    assert two_level([1, 2, 3], [1] * 3, 8, 4, 6.0, pinned={0: 8}) == [8, 4, 4]
    with pytest.raises(BudgetError):
        two_level([1, 2, 3], [1] * 3, 8, 4, 5.0, pinned={0: 8})


def test_two_level_is_monotone():
    importance, params = [0.3, 0.8, 0.1, 0.8, 0.5], [3, 1, 4, 1, 5]
    steps = [two_level(importance, params, 4, 2, target / 10) for target in range(20, 41)]
    for lower, higher, target in zip(steps, steps[1:], range(20, 41), strict=False):
        assert all(a <= b for a, b in zip(lower, higher, strict=True)) and mean(lower, params) <= target / 10 + 1e-9


def test_around():
    assert around((2, 3, 4, 8), 3.5) == (4, 3) and around((2, 3, 4, 8), 3) == (4, 2)
    assert around((2, 4), 2) == (2, 2) and around((2, 4), 4) == (4, 4)
    with pytest.raises(BudgetError):
        around((3, 4), 2.5)


def test_alignment_of_simple_layers():
    x = torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    across = torch.zeros(2, 5, 8)
    across[..., ::2], across[..., 1::2] = -x[..., 1::2], x[..., ::2]
    for y, expected in ((x, -1), (-x, 1), (across, 0), (7 * x, -1)):
        assert alignment([x], [y], [mask]) == pytest.approx((-10 * expected, 10), abs=1e-5)
    mask[1] = False
    assert alignment([x], [torch.cat([x[:1], -x[1:]])], [mask]) == pytest.approx((5, 5), abs=1e-5)


def test_lim_follows_the_residual_stream():
    model = make("llama")
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.data.zero_()
    scores = lim(model, Run(batches=batches()))
    assert scores[1] == pytest.approx(-1, abs=1e-6) and scores[0] > -0.99 and scores[2] > -0.99


def test_zd_by_reference():
    normal = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert share_above([normal]) == pytest.approx(0.1587, abs=0.002)
    assert share_above([2.5 * normal.double() - 3]) == pytest.approx(share_above([normal.double()]), abs=2e-6)
    assert share_above([torch.full((100,), 0.3)]) == 0
    whole = normal.double()
    full = float((whole > whole.mean() + whole.std(correction=0)).double().mean())
    assert share_above(list(normal.split(123_457))) == pytest.approx(full, abs=1e-9)
    assert share_above([tensor([0.0, 0, 0, 4])]) == 0.25                              # mean 1, deviation sqrt 3


SCORES = [torch.tensor([0.5, 1, 0, 2])] * 3


@pytest.mark.parametrize("how", ["lim", "zd", "sensitivity", "hessian", "lrp", "heads"])
def test_average_is_kept(how):
    model, heads = make("llama"), {"heads": "heads.any"} if how == "heads" else {}
    step = RTN(bits=3.4, group_size=16, allocate=how, overrides={"q_proj": {"bits": 8}}, widths=(2, 3, 4), **heads)
    assert step.needs_data == (how not in ("zd", "heads"))
    record = step.apply(model, Run(batches(), scores={"heads.any": SCORES}))
    modules = record.meta["modules"]
    assert 2.5 < record.meta["bits"] <= 3.4 < record.meta["effective_bits"]
    assert all(m["bits"] == 8 for name, m in modules.items() if name.endswith("q_proj"))
    assert len(record.meta["allocation"]["scores"]) == (3 if how in ("lim", "zd") else 12)
    for index, parts in itertools.product(range(3), [("k_proj", "v_proj"), ("gate_proj", "up_proj")]):
        bits = {m["bits"] for n, m in modules.items() if f"layers.{index}." in n and n.endswith(parts)}
        assert len(bits) == 1                                        # what runs as one kernel has one width


def test_sensitivity_saves_the_block_that_matters():
    model = make("llama")
    for index, strength in enumerate((0.05, 3.0, 0.05)):
        for projection in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            projection.weight.data *= strength
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record = GPTQ(bits=8 / 3, group_size=16, allocate="sensitivity", widths=(2, 4)).apply(model, Run(batches()))
    chosen = {name.removeprefix("model.layers."): told["bits"] for name, told in record.meta["modules"].items()}
    writers = {f"{index}.{name}": bits for index, bits in enumerate((2, 4, 2))
               for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert {name: bits for name, bits in chosen.items() if name in writers} == writers
    damage = record.meta["allocation"]["scores"]["model.layers.1.mlp.down_proj"]
    assert damage["2/16"] > damage["4/16"] > 0
    plans = record.meta["allocation"]["plans"]
    assert len(plans) >= 2 and min(plan["measured"] for plan in plans) > 0
    assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])


def test_a_dense_budget_changes_nothing():
    model, dense = make("llama"), make("llama")
    RTN(bits=16, group_size=16, allocate="zd", widths=(4, 16)).apply(model, Run())
    assert torch.equal(logits(model), logits(dense))


def test_same_seed_same_record():
    step = GPTQ(bits=3.5, group_size=16, allocate="sensitivity", widths=(3, 4), sweeps=0, clip=False, plans=1)
    first, second = (step.apply(make("qwen3", num_hidden_layers=1), Run(batches())).meta for _ in range(2))
    assert first == second


def test_small_models_are_tried_on_all_of_the_data(monkeypatch):
    def scores(**fields):
        step = RTN(bits=3.5, group_size=16, allocate="sensitivity", widths=(3, 4), plans=1, **fields)
        return step.apply(make("llama"), Run(batches())).meta["allocation"]["scores"]

    monkeypatch.setattr(measured, "FEW", 48)
    assert scores() == scores(trial_tokens=6 * 24) != scores(trial_tokens=48)
    monkeypatch.setattr(measured, "WORK", 1.0)
    assert scores() == scores(trial_tokens=48)


def test_allocation_errors():
    for fields in ({"bits": 3.5}, {"bits": 0}, {"bits": 17}, {"bits": 1.5, "allocate": "zd"},
                   {"bits": 4, "allocate": "zd", "widths": (2, 3)}, {"bits": 3, "bytes": 9000, "allocate": "lim"},
                   {"bits": 3, "plan": "plan.json"}):
        with pytest.raises(FieldError, match="bits"):
            RTN(**fields)
    with pytest.raises(LlmoptError, match="calibration data"):
        RTN(bits=3.5, group_size=16, allocate="lim").apply(make("llama"), Run())
    with pytest.raises(BudgetError):
        RTN(bits=2, group_size=16, allocate="zd", overrides={"mlp": {"bits": 8}}).apply(make("llama"), Run())
    assert average_bits([]) == 0
