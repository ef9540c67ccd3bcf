"""The student of replays: its regression written out, its scores in padded rows, turns and while decoding."""
import pytest
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.checkpoint.save import load, save
from llmopt.errors import LlmoptError
from llmopt.heads.replay import Replay
from llmopt.kv.expected import expected_attention
from llmopt.kv.kvzap import AHEAD, RIDGE, SINKS, Sums
from llmopt.kv.listener import own_scores, watch
from llmopt.kv.view import LayerKV
from llmopt.method import Record, Run
from tests.tiny import ids, make

CONTRACT = {"ratio": 0.5, "window": 8}
BEFORE = {"heads.replay": {"pieces": 2, "length": 96, "chunk": 48, "sinks": 2, "window": 4}}


def taught(family="llama", **fields):
    """(model, run with replays, method, what it has learned)."""
    model = make(family)
    run = Run([{"input_ids": ids(4, 96), "attention_mask": torch.ones(4, 96, dtype=torch.long)}])
    Replay(pieces=4, length=96, chunk=48, sinks=2, window=4).apply(model, run)
    method = kv.KVzap(**{"ratio": 0.5, "window": 8} | fields)
    return model, run, method, method.plan(model, run)


def test_the_sums_give_the_regression_of_deviations_from_each_text():
    tokens, cheap, logs = torch.randn(40, 5), torch.randn(2, 40, 3), torch.randn(2, 40)
    tokens[:, 2] = 1.0
    sums, parts = Sums(2), (slice(0, 15), slice(15, 40))
    for part in parts:
        sums.add(tokens[part], torch.cat([cheap[:, part], logs[:, part, None]], -1))
    for group, found in enumerate(sums.solve(0.1)):
        rows, told = torch.cat([tokens, cheap[group]], 1).double(), logs[group].double()
        apart, off = (torch.cat([x[part] - x[part].mean(0) for part in parts]) for x in (rows, told))
        ridges = torch.tensor([0.1, 0.1, *[RIDGE] * 6])                         # rows more; the constant moves nothing
        wide = torch.cat([apart, (ridges * apart.square().sum(0)).clamp(min=1e-9).sqrt().diag()])
        wanted = torch.linalg.lstsq(wide, torch.cat([off, torch.zeros(8).double()])[:, None]).solution[:, 0]
        wanted[2] = sum((told[part].mean() - rows[part].mean(0) @ wanted) for part in parts) / 2
        assert_close(found, wanted)


def test_rounding_is_not_learned_from():
    """Keys that a norm makes equally long: their lengths tell of rounding alone, though that may go with the scores."""
    tokens, logs = torch.randn(40, 3), torch.randn(1, 40)
    tokens[:, 2] = 1.0
    lengths, found = 4 + 4e-7 * logs, []
    for own in (lengths, torch.full_like(lengths, 4.0)):
        sums = Sums(2)
        sums.add(tokens, torch.stack([own, logs], -1))
        found.append(sums.solve(0.1)[0])
    assert found[0][3] == 0
    assert_close(found[0], found[1])


def test_what_sets_two_texts_apart_is_not_learned():
    """Of two texts the second has a mark in every token and low scores; marked tokens of a third are no worse."""
    mark, slope = torch.tensor([0.0, 1.0]).repeat_interleave(30), torch.randn(60)
    logs = slope - 9 * mark
    sums = Sums(2)
    for part in (slice(0, 30), slice(30, 60)):
        tokens = torch.stack([mark, slope, torch.ones(60)], 1)[part]
        sums.add(tokens, torch.cat([torch.zeros(1, 30, 1), logs[None, part, None]], -1))
    assert_close(sums.solve(1e-6)[0, :3].float(), torch.tensor([0.0, 1.0, -4.5]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("features", ["all", "hidden"])
@torch.no_grad()
def test_it_has_learned_what_a_second_reading_looks_at(features):
    model, run, method, record = taught(features=features)
    for piece in run.replays:
        for own, told in zip(own_scores(method, record, model, piece.ids), piece.scores, strict=True):
            for pair in zip(own[:, 2:-4].log(), told[:, 2:-4].log(), strict=True):
                assert float(torch.corrcoef(torch.stack(pair))[0, 1]) > 0.4
    for scores in (scores for piece in run.replays for scores in piece.scores):
        scores[:, :2], scores[:, -4:] = 1.0, 1.0                                # those are kept whatever their score
    again = method.plan(model, run)
    assert all(torch.equal(record.tensors[name], again.tensors[name]) for name in record.tensors)


@torch.no_grad()
def test_its_features_are_those_of_the_formula():
    """Layer 1, by hand: the weights are drawn, the features written out with the other scorers."""
    model, _, method, record = taught()
    weights = record.tensors["student.1"]
    weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)) / 30)
    views: list[LayerKV] = []
    watch(model, ids(1, 60)[0], views.append)
    view = views[1]
    keys, sizes = view.keys[0], [x[0].norm(dim=-1) for x in (view.values, view.keys)]
    unit = keys / sizes[1][..., None]
    alike = torch.cosine_similarity(keys, unit.mean(1, keepdim=True), dim=-1)
    shares = [expected_attention(view, SINKS, AHEAD, view.holes)[0], kv.SnapKV(ratio=0.5).score(view)[0]]
    beside = [*((60 * share).log() for share in shares), sizes[0], -alike, sizes[1]]
    places = torch.arange(60.0)[:, None]
    tokens = torch.cat([view.hidden[0], torch.ones(60, 1), (1 + places).log()], 1)
    wanted = (tokens @ weights[:, :66].T).T + (torch.stack(beside, -1) @ weights[:, 66:, None]).squeeze(-1)
    assert_close(own_scores(method, record, model, ids(1, 60)[0])[1], wanted.exp(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("features", "allocate"), [("all", "uniform"), ("hidden", "global"), ("all", "captured")])
@torch.no_grad()
def test_a_padded_row_keeps_what_it_keeps_alone(features, allocate):
    model, run, method, _ = taught(features=features, allocate=allocate)
    tokens, pads = ids(2, 60, 5), 9
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    with runtime.attached(model, method, run=run):
        cache = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                      use_cache=True).past_key_values
        for row, start in ((0, 0), (1, pads)):
            alone = model(tokens[row:row + 1, start:], use_cache=True).past_key_values
            for both, one in zip(cache.layers, alone.layers, strict=True):
                wanted = [one.kept.positions[where] + start for _, _, where in one.kept.heads()]
                found = [both.kept.positions[where] for r, _, where in both.kept.heads() if r == row]
                assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True))
        text = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        single = model.generate(tokens[1:, pads:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert text[1, -5:].tolist() == single[0, -5:].tolist()
    assert sum(int(c[1].sum()) for c in cache.kept()) == 26 * 6                 # 51 - floor(51 / 2)


@torch.no_grad()
def test_a_token_is_judged_once():
    """Without cheap scores a prompt in chunks, and tokens that are decoded, are judged as in one prefill.

    Those that wait for the next compression take one number for each KV head, and no query.
    """
    model, _, method, record = taught(features="hidden", ratio=None, budget=25, sinks=0, window=0, every=3)
    tokens = ids(1, 60, 5)
    wanted = own_scores(method, record, model, tokens[0])
    runtime.attach(model, method, record)
    cache = model(tokens[:, :30], use_cache=True).past_key_values
    for start, stop in ((30, 51), *((i, i + 1) for i in range(51, 60))):
        cache = model(tokens[:, start:stop], past_key_values=cache).past_key_values
        waiting = cache.layers[0]
        assert stop % 3 == 0 or (waiting.queries.numel(), waiting.hidden.shape) == (0, (1, stop % 3, 2))
    for layer, scores in zip(cache.layers, wanted, strict=True):
        for _, head, where in layer.kept.heads():
            places = layer.kept.positions[where].long()
            assert len(places) == 25 and not torch.equal(places, torch.arange(35, 60))
            if layer is cache.layers[0]:                            # in later ones what is missing below changes x
                assert places.tolist() == scores[head].topk(25).indices.sort().values.tolist()
                assert_close(layer.kept.carried["zap"][where], scores[head, places], rtol=1e-3, atol=1e-9)


@torch.no_grad()
def test_tokens_of_another_method_have_the_mean_of_the_known():
    model, _, method, record = taught()
    with runtime.attached(model, kv.Streaming(budget=40)):
        cache = model(ids(1, 40), use_cache=True).past_key_values
    runtime.attach(model, method, record)
    kept = model(ids(1, 20, 4), past_key_values=cache).past_key_values.layers[0].kept
    for _, _, where in kept.heads():
        old = kept.carried["zap"][where][kept.positions[where] < 40]
        assert len(old) and bool((old == old[0]).all())


@torch.no_grad()
def test_a_checkpoint_brings_its_weights(tmp_path):
    model, run, method, _ = taught(allocate="captured")
    record = method.apply(model, run)
    save(model, tmp_path / "out")
    fresh, _ = load(tmp_path / "out")
    found = runtime.attachment(fresh).record("evicting kv method")
    assert found.meta == record.meta
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in record.tensors.items())


def test_it_refuses_what_does_not_fit():
    model, run, method, record = taught()
    with pytest.raises(LlmoptError, match="kv.kvzap needs the step heads.replay before it"):
        method.plan(model, Run())
    with pytest.raises(LlmoptError, match=r"student.0 is torch.float32 \[2, 9\], this model needs floats \[2, 71\]"):
        method.restore(model, Record(record.meta, record.tensors | {"student.0": torch.zeros(2, 9)}))
    with pytest.raises(LlmoptError, match=r"student.7 is .*, this model needs no such tensor"):
        method.restore(model, Record(record.meta, record.tensors | {"student.7": torch.zeros(2, 71)}))
    with pytest.raises(LlmoptError, match="the weights student.1 are missing"):
        method.restore(model, Record(record.meta, {"student.0": record.tensors["student.0"]}))
    run.replays[0].scores[1] = run.replays[0].scores[1][:1]
    for step in (method, kv.Expected(ratio=0.5, allocate="captured")):
        with pytest.raises(LlmoptError, match=r"with \[2, 1, 2\] KV heads per layer; the model has \[2, 2, 2\]"):
            step.plan(model, run)
