"""Head scores against hand-computed maps, finite differences and the padding they must not see."""
import json

import pytest
import torch

from llmopt.calibration import losses as loss_module
from llmopt.calibration.backward import undisturbed
from llmopt.calibration.head_scores import check_scores
from llmopt.calibration.losses import losses, target_shares
from llmopt.errors import FieldError, LlmoptError
from llmopt.heads import Gradient, Hess, Need90, Span, WaadFai, load_scores, plot, save_scores
from llmopt.heads.gradient import gates
from llmopt.heads.span import Columns, sinks
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.runtime import attention_rows as rows_of
from llmopt.runtime.attention_rows import Rows, attention_rows
from tests import tiny

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "gpt2", "opt", "mixtral",
            "qwen2_moe", "qwen3_moe")
METHODS = (Span(), Need90(), Gradient(), Hess(), WaadFai(score="fai", first=2, last=5))


def batch(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def scores(method, model, batches):
    run = Run(batches=batches)
    method.apply(model, run)
    return run.scores[method.name]


def totals(weights, real=None, tiles=1):
    """(distance, attention on sinks) of the one map [T, T] of two heads, in tiles of rows."""
    count = len(weights)
    real, found = torch.ones(count) if real is None else real, Columns(2)
    for part in torch.arange(count).chunk(tiles):
        seen = torch.arange(int(part[-1]) + 1)
        found.add(Rows(0, weights[part][:, seen].expand(1, 2, -1, -1), part, seen, real[None, part]))
    assert torch.equal(found.totals()[:, 0], found.totals()[:, 1])
    return found.totals()[:, 0].tolist()


def even(count):
    weights = torch.tril(torch.ones(count, count))
    return weights / weights.sum(1, keepdim=True)


def test_identity_has_no_span_and_even_rows_half_their_index():
    assert totals(torch.eye(6)) == [0, 1]                               # the first token reads itself
    harmonic = sum(1 / (t + 1) for t in range(6))                       # attention on token 0
    for tiles in (1, 3):
        expected = [sum(t / 2 - t / (t + 1) for t in range(6)), harmonic]
        assert totals(even(6), tiles=tiles) == pytest.approx(expected, rel=1e-5)
    only_last = torch.tensor([0., 0, 0, 0, 0, 1])                       # it is the first real token: a sink
    assert totals(even(6), only_last) == pytest.approx([2.5 - 0, 1 / 6], rel=1e-5)


@pytest.mark.parametrize("at", [0, 9])
def test_a_planted_sink_is_no_distance(at):
    """Every later query puts .7 on one token: what is left is the distance of the rest, and .7 is told beside it."""
    count, weights = 64, even(64)
    weights[at + 1:] *= 0.3
    weights[at + 1:, at] += 0.7
    found, marked = totals(weights), sinks(weights.sum(0)[None], torch.ones(count, dtype=torch.bool))[0]
    assert marked.nonzero().flatten().tolist() == sorted({0, at})
    apart = torch.arange(count)[:, None] - torch.arange(count)
    kept = (weights * apart)[:, ~marked].sum()
    assert found == pytest.approx([float(kept), float(weights[:, marked].sum())], rel=1e-5)
    assert float((weights * apart).sum()) > 3 * found[0]                # with the sink the span is another one


def test_even_attention_and_a_word_that_few_tokens_read_are_no_sinks():
    assert sinks(even(300).sum(0)[None], torch.ones(300).bool())[0].nonzero().tolist() == [[0]]
    late = even(64)
    late[60:] = 0
    late[60:, 59] = 1                                                   # the last four read one word
    assert sinks(late.sum(0)[None], torch.ones(64).bool())[0].nonzero().tolist() == [[0]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tiles_are_the_rows_of_the_models_own_maps(family, monkeypatch):
    monkeypatch.setattr(rows_of, "ENTRIES", 2 * 4 * 40 * 7)      # seven queries a tile
    model, given = tiny.make(family), batch(tiny.ids(2, 40))
    given["attention_mask"][0, :9] = 0                           # padding on the left
    model.set_attn_implementation("eager")
    expected = model(**given, use_cache=False, output_attentions=True)
    maps = expected.attentions
    found = [torch.zeros_like(m) for m in maps]

    def see(rows):
        found[rows.layer][:, :, rows.queries[:, None], rows.keys] = rows.weights

    with attention_rows(model, see):
        logits = model(**given, use_cache=False).logits
    real = given["attention_mask"].bool()
    for mine, theirs in zip(found, maps, strict=True):
        torch.testing.assert_close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_span_of_a_model_that_attends_evenly():
    model = tiny.make("llama")
    for block in blocks(model):
        projection, rows = block.part("q")
        projection.weight[rows.flatten()] = 0        # equal logits: even causal rows, mean span (T - 1) / 4 and token 0
    run = Run(batches=[batch(tiny.ids(2, 21))])
    record, first = Span().apply(model, run), sum(t / (t + 1) for t in range(21)) / 21
    for layer, mass in zip(run.scores["heads.span"], record.meta["sink_mass"], strict=True):
        torch.testing.assert_close(layer, torch.full((4,), 5.0 - first))
        assert mass == pytest.approx([1 - first] * 4, rel=1e-5)


@torch.no_grad()
def test_span_sees_sliding_windows():
    model = tiny.make("gemma2")                      # window 16 in every other layer
    for block in blocks(model):
        projection, rows = block.part("q")
        projection.weight[rows.flatten()] = 0
    first, second, _ = scores(Span(), model, [batch(tiny.ids(1, 120))])
    assert first.max() < 8 < 25 < second.min()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(method, family):
    model, ids = tiny.make(family), tiny.ids(3, 20)
    alone = scores(method, model, [batch(ids[:1, :11]), batch(ids[1:])])
    padded = batch(ids.clone())
    padded["attention_mask"][0, 11:] = 0
    padded["input_ids"][0, 11:] = 0
    together = scores(method, model, [padded])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert max(s.std() for s in together) > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_model_comes_out_as_it_went_in(method):
    model = tiny.make("llama")
    model.train()
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    state, implementation = {k: v.clone() for k, v in model.state_dict().items()}, model.config._attn_implementation
    scores(method, model, [batch(tiny.ids())])
    assert model.training and all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_undisturbed_restores_after_an_error():
    model = tiny.make("llama").train()
    with pytest.raises(ZeroDivisionError), undisturbed(model), attention_rows(model, lambda rows: 1 / 0):
        model(tiny.ids())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_open_gates_change_nothing_bit_for_bit(family):
    model, ids = tiny.make(family), tiny.ids()
    views = blocks(model)
    expected = model(ids).logits
    with gates(views, [torch.ones(len(ids), b.heads) for b in views]):
        assert torch.equal(model(ids).logits, expected)
    with gates(views, [torch.zeros(len(ids), b.heads) for b in views]):
        assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_slopes_equal_finite_differences(family):
    model, ids = tiny.make(family, dtype=torch.float64), tiny.ids(2, 16)
    views, given = blocks(model), batch(ids)
    slopes = Gradient()._slopes(model, views, given)

    @torch.no_grad()
    def loss(layer, head, value):
        open_ = [torch.ones(2, b.heads, dtype=torch.float64) for b in views]
        open_[layer][:, head] = value
        with gates(views, open_):
            return losses(model(ids).logits[:, :-1], ids[:, 1:], target_shares(given["attention_mask"]))

    for layer, head in ((0, 0), (1, 3), (2, 2)):
        measured = (loss(layer, head, 1.005) - loss(layer, head, 0.995)) / 0.01
        torch.testing.assert_close(slopes[layer][:, head], measured, atol=1e-4, rtol=2e-3, check_dtype=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_taken_a_few_tokens_at_a_time(family, monkeypatch):
    model, given = tiny.make(family), batch(tiny.ids(3, 20))
    given["attention_mask"][0, 11:] = 0
    whole = Gradient()._slopes(model, blocks(model), given)
    sizes, plain = [], loss_module.losses
    monkeypatch.setattr(loss_module, "losses",
                        lambda logits, *rest: (sizes.append(logits.shape), plain(logits, *rest))[1])
    monkeypatch.setattr(loss_module, "LOGITS", 3 * tiny.VOCABULARY * 7)
    parts = Gradient()._slopes(model, blocks(model), given)
    assert [size[1] for size in sizes] == [7, 7, 5]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_slopes_of_a_layer_add_up_to_the_slope_of_its_whole_output():
    model, ids = tiny.make("llama"), tiny.ids(1, 16)
    views = blocks(model)
    slopes = Gradient()._slopes(model, views, batch(ids))
    scale = torch.ones(1, requires_grad=True)
    handle = views[1].attn_out.module.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    total = losses(model(ids).logits[:, :-1], ids[:, 1:], target_shares(torch.ones_like(ids))).sum()
    handle.remove()
    torch.testing.assert_close(torch.autograd.grad(total, scale)[0], slopes[1].sum()[None], atol=1e-5, rtol=1e-4)


def test_absolute_values_are_taken_per_sample():
    model, ids = tiny.make("llama"), tiny.ids(2, 16)
    views = blocks(model)
    slopes = Gradient()._slopes(model, views, batch(ids))
    raw = scores(Gradient(normalize="none"), model, [batch(ids)])
    torch.testing.assert_close(raw[0], slopes[0].abs().mean(0))
    for layer in scores(Gradient(), model, [batch(ids)]):
        torch.testing.assert_close(layer.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_scores_of_a_bfloat16_model_are_those_of_its_weights(method):
    half = tiny.make("llama", dtype=torch.bfloat16)
    wide = tiny.make("llama").float()
    wide.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    given = [batch(tiny.ids(8, 32))]
    for a, b in zip(scores(method, half, given), scores(method, wide, given), strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_slopes_of_a_bfloat16_model_are_not_rounded():
    model = tiny.make("llama", dtype=torch.bfloat16)
    for slope in Gradient()._slopes(model, blocks(model), batch(tiny.ids())):
        assert slope.dtype == torch.float32
        assert not torch.equal(slope, slope.bfloat16().float())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_layer_without_attention_has_an_empty_score(method):
    model = tiny.make("llama")
    apply_plan(model, [LayerPlan(), LayerPlan(skip=("attention",)), LayerPlan(kv_groups=torch.tensor([1]))], Run())
    run = Run(batches=[batch(tiny.ids())])
    record = method.apply(model, run)
    assert [len(s) for s in run.scores[method.name]] == [4, 0, 2]
    assert record.meta["samples"] == 4 and record.meta["tokens"] == 96
    json.dumps(record.meta)


def test_scores_travel_through_json_and_plots(tmp_path):
    kept = [torch.tensor([0.1, 2.0]), torch.tensor([]), torch.tensor([1.0])]
    save_scores(tmp_path / "s.json", "heads.x", kept, {"samples": 3})
    again = load_scores(tmp_path / "s.json")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert json.loads((tmp_path / "s.json").read_text())["samples"] == 3
    (tmp_path / "bare.json").write_text("[[1, 2]]")
    assert load_scores(tmp_path / "bare.json")[0].tolist() == [1, 2]
    plot(kept, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_bad_scores_and_files_are_refused(tmp_path):
    with pytest.raises(LlmoptError, match="not finite"):
        check_scores([torch.tensor([1.0, float("nan")])], [2])
    with pytest.raises(LlmoptError, match="the model has"):
        check_scores([torch.ones(3)], [2])
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(LlmoptError, match="bad.json"):
        load_scores(tmp_path / "bad.json")
    with pytest.raises(LlmoptError, match="none.json"):
        load_scores(tmp_path / "none.json")
    with pytest.raises(LlmoptError, match="calibration"):
        Span().apply(tiny.make("llama"), Run())
    with pytest.raises(FieldError, match="normalize"):
        Gradient(normalize="x")
