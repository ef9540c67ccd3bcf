"""units: [weights]: exact counts, patterns, Wanda and SparseGPT by hand, one threshold for all, the fit of the rest."""
import pytest
import torch
from torch import tensor

import llmopt
from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import FLAP, OBS, Magnitude, Wanda
from llmopt.prune.masks import comparable, counts_below, fitted, half_of_each, smallest
from llmopt.prune.obs import swept
from llmopt.prune.sparse import Gone
from llmopt.quant import GPTQ, RTN
from llmopt.recipe import reader
from tests import tiny

METHODS = [Magnitude, Wanda, OBS]


def made(method, ratio=0.5, **fields):
    return method(ratio=ratio, units=["weights"], **fields)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows=400, width=12):
    return (noise(rows, width) + noise(rows, 1, seed=1)) * torch.linspace(0.3, 3, width)


def data(rows=8, length=24):
    ids = tiny.ids(rows, length)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def zeros(model):
    return [projection.weight == 0 for block in blocks(model) for projection in block.projections()]


def test_counts_are_exact_with_ties_too():
    assert smallest(tensor([[3.0, 1, 2, 1], [1, 1, 1, 1]]), 2).tolist() == [[False, True, False, True],
                                                                          [True, True, False, False]]
    assert not smallest(torch.zeros(5), 0).any()
    for dtype in (torch.float32, torch.bfloat16):
        scores = noise(3, 999).abs().to(dtype)
        assert smallest(scores, 333).sum(1).tolist() == [333] * 3
    assert half_of_each(tensor([[1.0, 2, 3, 4, 9, 7, 8, 6]]), 4).tolist() == [[True, True, False, False] * 1 +
                                                                             [False, True, False, True]]


def test_lamp_by_hand():
    assert comparable(tensor([1.0, 3, 2]), "lamp").tolist() == pytest.approx([1, 4 / 13, 1 / 14])
    w = noise(50).abs()
    torch.testing.assert_close(comparable(7 * w, "lamp"), comparable(w, "lamp"))
    torch.testing.assert_close(comparable(7 * w, "layer"), comparable(w, "layer"))
    assert comparable(w, "none") is w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_threshold_is_exact(dtype):
    weights = [(noise(40, 30, seed=i) * scale).to(dtype).float().abs() for i, scale in enumerate((1.0, 0.3, 2.0))]
    whole, count = torch.cat([w.flatten() for w in weights]), 1700
    first = smallest(whole, count).split(1200)
    assert counts_below(lambda: iter(weights), count / 3600, 1e-9) == [int(part.sum()) for part in first]
    floored = counts_below(lambda: iter(weights), 0.5, 0.4)
    assert sum(floored) == 1800 and max(floored) == floored[1] == 720
    assert counts_below(lambda: iter([torch.ones(4, 2), torch.ones(3)]), 0.5, 0.1) == [5, 0]        # ties: the first
    assert counts_below(lambda: iter(weights), 0, 0.1) == [0, 0, 0]
    with pytest.raises(BudgetError, match="ratio 0.7 cannot be met: minimum 0.4 leaves at most 0.600"):
        counts_below(lambda: iter(weights), 0.7, 0.4)


def test_wanda_compares_within_a_row_and_is_magnitude_where_inputs_are_alike():
    w, gone = noise(6, 12), Gone(36)
    _, out = made(Wanda).zeroed(w, torch.full((12,), 3.0).double(), gone)
    assert out.sum(1).tolist() == [6] * 6 and torch.equal(out, smallest(w.abs(), 6))
    values, out = made(Wanda).zeroed(w, tensor([0.0] * 6 + [1.0] * 6).double(), gone)
    assert out[:, :6].all() and torch.equal(values[:, 6:], w[:, 6:])


def test_sparsegpt_on_white_inputs_takes_the_smallest_and_moves_nothing():
    w = noise(6, 300)
    values, out = made(OBS).zeroed(w, 5 * torch.eye(300).double(), Gone(700))
    assert int(out.sum()) == 700
    assert torch.equal(values, w.masked_fill(out, 0))
    assert torch.equal(out[:, :128], smallest(w[:, :128].flatten(), 0).view(6, 128) | smallest(
        w[:, :128].square().flatten(), 700 * 128 // 300).view(6, 128))


def test_sparsegpt_by_hand():
    """Two inputs; the first goes, and the second takes over what of it it can."""
    gram = tensor([[4.0, 2.0], [2.0, 3.0]])
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    values, out = swept(tensor([[0.1, 5.0]]), factor, tensor([False, False]), Gone(1))
    assert out.tolist() == [[True, False]]
    torch.testing.assert_close(values, tensor([[0.0, 5 + 0.1 * 2 / 3]]))             # least squares: w_1 H_12 / H_22
    values, out = swept(tensor([[0.1, 5.0]]), factor, tensor([False, True]), Gone(1))
    assert out.tolist() == [[False, True]]                                           # what is never read goes first


def test_the_more_a_method_knows_the_less_it_disturbs():
    x, w = inputs(), noise(20, 12, seed=3)
    gram = x.double().T @ x.double()

    def lost(method, seen, **fields):
        values, out = made(method, **fields).zeroed(w, seen, Gone(120))
        return ((values - w) @ x.T).square().sum(), values, out

    plain, (swift, *_), (careful, values, out) = lost(Magnitude, None), lost(Wanda, gram.diagonal()), lost(OBS, gram)
    assert careful < swift < plain[0]
    error = ((fitted(values, ~out, w, gram, 0.0) - w) @ x.T).square().sum()
    assert error < careful
    exact = sum((x[:, ~o] @ torch.linalg.lstsq(x[:, ~o], x @ row[:, None]).solution - x @ row[:, None]).square().sum()
                for row, o in zip(w, out, strict=True))
    assert error == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen2"])
def test_patterns_and_counts_hold_in_every_weight(family, method, refit):
    """Conv1D, fused and biased weights; columns run along the inputs."""
    for pattern in ("2:4", None):
        model = tiny.make(family)
        record = made(method, pattern=pattern, refit=refit).apply(model, Run(batches=data()))
        assert record.meta["removed_share"] == 0.5
        for found in zeros(model):
            assert found.float().mean() == 0.5
            if pattern:
                assert (found.unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert [one.get("refit", 0) <= one.get("cut", 0) for one in record.meta["weights"]] == [True] * len(zeros(model))


def test_nothing_leaves_at_ratio_0():
    for method in METHODS:
        model = tiny.make("llama")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert made(method, ratio=0).apply(model, Run(batches=data())).meta["removed_share"] == 0
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scopes_of_magnitude():
    def share(scale=1.0, **fields):
        model = tiny.make("llama")
        for projection in blocks(model)[1].projections():
            projection.write(projection.weight * scale)
        record = made(Magnitude, refit=False, **fields).apply(model, Run())
        assert record.meta["removed_share"] == pytest.approx(0.5, abs=1e-5)
        return [float(found.float().mean()) for found in zeros(model)][7:14]           # of the second block

    assert share() == [0.5] * 7
    raw = share(0.2, scope="global", normalize="none")
    assert min(raw) > 0.9 and max(raw) <= 0.95                                         # the floor
    for fields in ({"scope": "lamp"}, {"scope": "global"}, {"scope": "global", "normalize": "layer"}):
        assert share(0.25, **fields) == share(**fields)


@pytest.mark.parametrize(("method", "fields", "says"), [
    (Magnitude, {"pattern": "2:4", "ratio": 0.3}, "ratio.*0.5, as pattern 2:4 is half"),
    (Magnitude, {"pattern": "2:4", "scope": "global"}, "scope.*local: pattern 2:4"),
    (Magnitude, {"scope": "flap"}, "scope.*local or global or lamp"), (Wanda, {"scope": "lamp"}, "scope.*local, as"),
    (Magnitude, {"pattern": "1:4"}, "pattern"), (OBS, {"units": ["weights", "ffn"]}, r"units.*\[weights\] alone"),
    (OBS, {"units": ["ffn"], "pattern": "2:4"}, r"pattern.*null, or units: \[weights\]"), (FLAP, {}, "units")])
def test_bad_fields_are_named(method, fields, says):
    with pytest.raises(FieldError, match=says):
        method(**{"ratio": 0.5, "units": ["weights"]} | fields)


def test_what_does_not_fit_the_model_is_named():
    with pytest.raises(LlmoptError, match="down_proj: its 90 inputs are no multiple of 4, as pattern 2:4 needs"):
        predict(tiny.make("llama", intermediate_size=90), [made(Wanda, pattern="2:4")])
    with pytest.raises(BudgetError, match="ratio 0.97 cannot be met: minimum 0.05 leaves at most 0.950 of every"):
        made(Magnitude, ratio=0.97, refit=False).apply(tiny.make("llama"), Run())
    model = tiny.make("llama")
    blocks(model)[1].attn_out.weight[3, 3] = torch.nan
    for scope in ("local", "global"):
        with pytest.raises(LlmoptError, match="layers.1.self_attn.o_proj: the weight holds NaN or Inf"):
            made(Magnitude, scope=scope, refit=False).apply(model, Run())
    model = tiny.make("llama")
    blocks(model)[0].ffn_in[1].weight[3] = torch.inf
    with pytest.raises(LlmoptError, match="layers.0.mlp.up_proj: the weight holds NaN or Inf"):
        made(OBS).apply(model, Run(batches=data()))


def test_plan_log_and_record_say_what_it_does_not_save(caplog, tmp_path):
    model, step = tiny.make("llama"), made(Magnitude, pattern="2:4", refit=False)
    told = predict(model, [step, RTN(bits=4, group_size=16)])
    assert told.steps[0][1].startswith("zeroes 50.0% of 21 weights, 2:4; as many bytes and operations as before")
    report = llmopt.compress(model, [step, RTN(bits=4, group_size=16)])
    llmopt.save(model, tmp_path / "out", report=report)
    assert "\n- `prune.magnitude`: as many bytes and operations as before, unless" in (
        tmp_path / "out/README.md").read_text()
    assert "behind it, quant.gptq will fill zeros again" in step.notes(Run(ahead=(GPTQ(bits=4, keep_zeros=False),)))[-1]
    assert "prune.magnitude: as many bytes and operations as before" in caplog.text
    assert report.records[0]["meta"]["notes"][1].startswith("without the refit")
    assert all((found.unflatten(1, (-1, 4)).sum(2) >= 2).all() for found in zeros(model))       # RTN: 0 stays 0


def test_a_pattern_without_quotes_is_no_number():
    text = "model: {id: m}\nsteps: [prune.obs: {ratio: 0.5, units: [weights], pattern: 2:4}]\n"
    assert reader.parse(text, "r.yaml").steps == (made(OBS, pattern="2:4"),)
