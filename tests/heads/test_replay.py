"""The profile of replays: thresholds over all heads, by hand; what it tells is in force in a cache."""
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import llmopt
from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.heads.replay import joined_rows, kept_parts
from llmopt.kv.listener import own_scores
from llmopt.method import Record, Replayed, Run
from llmopt.runtime.replay import replay_scores
from tests.tiny import ids, make

CONTRACT = {"pieces": 3, "length": 64, "chunk": 32, "sinks": 2, "window": 4}


def data(rows=4, tokens=40):
    return Run([{"input_ids": ids(rows, tokens), "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}])


def test_parts_are_those_of_one_threshold():
    scores = [torch.tensor([[9., .9, .1, .8, .7, 9.]]), torch.tensor([[9., .6, .2, .3, .95, 9.]]), torch.zeros(0, 6)]
    piece = Replayed(torch.arange(6), scores, (1, 1), [0, 0, 0])
    assert [part.tolist() for part in kept_parts(piece, 0.5)] == [[0.75], [0.25], []]       # .95 .9 .8 .7 stay
    assert [part.tolist() for part in kept_parts(piece, 0.25)] == [[0.25], [0.25], []]
    slid = replace(piece, slid=[0, 3, 0])                                           # of the second .3 .95 are left
    assert [part.tolist() for part in kept_parts(slid, 0.5)] == [[0.5], [0.5], []]
    assert [part.tolist() for part in kept_parts(replace(piece, slid=[0, 5, 0]), 0.5)] == [[0.5], [0.5], []]


def test_an_even_share_is_one_where_windows_slide():
    model, run = make("gemma2"), data()
    record = llmopt.heads.Replay(pieces=2, length=80, chunk=40, sinks=4, window=4).apply(model, run)
    assert run.replays[0].sizes().tolist() == [11, 11, 72, 72, 11, 11]           # 15 in sight, 4 are last
    assert abs(float(torch.stack(run.scores["heads.replay"]).mean()) - 1) < 0.02
    told = torch.tensor(record.meta["at_50"])[:, ::2].flatten()
    assert abs(float((told * run.replays[0].sizes()).sum()) - 0.5 * 188) < 1


def test_rows_are_joined_without_padding():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = [{"input_ids": torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), "attention_mask": mask}]
    assert [text.tolist() for text in joined_rows(rows, 9, 3)] == [[1, 2, 3], [4, 5, 6]]
    assert [text.tolist() for text in joined_rows(rows, 9, 20)] == [[1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_scores_are_the_largest_attention_of_a_second_reading(family):
    """Against one eager forward over the context and the chunk behind it."""
    model, text = make(family), ids(1, 40)[0]
    asked = [5, 6]
    scores = replay_scores(model, text, asked, 24)
    model.set_attn_implementation("eager")
    best = [torch.zeros_like(layer) for layer in scores]
    for start in (0, 24):
        again = torch.cat([text, torch.tensor(asked), text[max(0, start - 8):start + 24]])[None]
        for layer, weights in enumerate(model(again, output_attentions=True).attentions):
            seen = weights[0, :, 40:, :40].amax(1).unflatten(0, (len(best[layer]), -1)).amax(1)
            best[layer] = torch.maximum(best[layer], seen)
    for mine, eager in zip(scores, best, strict=True):
        there = mine > 0                                       # a sliding layer has lost the first entries
        assert there.float().mean() > 0.3
        assert_close(mine[there], eager[there], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_with_plus_they_are_those_of_the_scorer(family):
    model, text = make(family), ids(1, 40)[0]
    found = replay_scores(model, text, [5, 6], 24, plus=True)
    zipped = own_scores(kv.KVzip(ratio=0.5, chunk=24, plus=True), Record({"request": [5, 6]}), model, text)
    for mine, theirs, plain in zip(found, zipped, replay_scores(model, text, [5, 6], 24), strict=True):
        there = mine > 0                                       # a sliding layer has lost the first entries
        assert_close(mine[there], theirs[there])
        assert not torch.allclose(mine[there], plain[there], rtol=0.1)


def test_the_profile_reaches_the_cache_from_a_step_and_from_a_file(tmp_path):
    model, run = make("llama"), data()
    record = llmopt.heads.Replay(pieces=2, length=80, chunk=40, sinks=1, window=4).apply(model, run)
    assert [len(layer) for layer in record.meta["at_25"]] == [4, 4, 4]
    told = torch.tensor(record.meta["at_25"])[:, ::2]                                   # two query heads a group
    assert abs(float(told.mean()) - 0.25) < 0.02
    llmopt.heads.save_scores(tmp_path / "p.json", "heads.replay", run.scores["heads.replay"], record.meta)
    tokens, found = ids(1, 100), []
    for heads, source in ((None, run), (str(tmp_path / "p.json"), data())):
        method = kv.SnapKV(budget=29, sinks=1, window=4, minimum=1, allocate="profile", heads=heads)
        with runtime.attached(model, method, run=source), torch.no_grad():
            found.append(torch.cat(model(tokens, use_cache=True).past_key_values.kept()))
    assert torch.equal(found[0], found[1]) and int(found[0].sum()) == 29 * 6
    assert float((found[0] - (told * 95 + 5)).abs().max()) < 2.5                 # 24 of 95 are a little over a quarter


def test_a_profile_needs_its_step():
    model = make("llama")
    with pytest.raises(LlmoptError, match="no score step 'heads.replay'"):
        kv.SnapKV(ratio=0.5, allocate="profile").apply(model, Run())
    run = data()
    llmopt.heads.Span().apply(model, run)
    with pytest.raises(LlmoptError, match="heads.span does not tell 'at_5'"):
        kv.SnapKV(ratio=0.5, allocate="profile", heads="heads.span").apply(model, run)
    with pytest.raises(LlmoptError, match="captured needs the step heads.replay"):
        kv.SnapKV(ratio=0.5, allocate="captured").apply(model, run)
