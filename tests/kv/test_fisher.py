"""Budgets from predictions: the error of a head that is cut, its gradient, and where entries go."""
import pytest
import torch
from torch.testing import assert_close

from llmopt import kv
from llmopt.calibration import losses
from llmopt.calibration.rereading import Reread, moves, replay_odds, reread
from llmopt.errors import FieldError, LlmoptError
from llmopt.heads.replay import Replay
from llmopt.kv.captured import PLACES
from llmopt.kv.fisher import errors
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests.tiny import ids, make


def replayed(family):
    model, run = make(family), Run([{"input_ids": ids(3, 80), "attention_mask": torch.ones(3, 80, dtype=torch.long)}])
    Replay(pieces=3, length=80, chunk=40, sinks=1, window=4).apply(model, run)
    return model, run


def test_the_error_of_a_cut_head_is_that_of_attention_without_the_others():
    weights, values, slope = torch.rand(4, 3, 20).softmax(-1), torch.randn(2, 20, 5), torch.randn(4, 3, 5)
    output = weights @ values.repeat_interleave(2, 0)
    order = torch.stack([torch.randperm(12), torch.randperm(12)]) + 6           # positions; 2 have slid away: 4 to 15
    found = errors(Reread(0, 22, weights, values, output, slope), order)
    for place in (0, 20, 40, len(PLACES) - 1):
        for group in range(2):
            kept = torch.ones(20, dtype=torch.bool)
            kept[order[group, int((PLACES[place] * 12).round()):] - 2] = False
            heads = slice(2 * group, 2 * group + 2)
            cut = weights[heads] * kept
            moved = (cut / cut.sum(-1, keepdim=True)) @ values[group] - output[heads]
            assert_close(found[group, place], (moved * slope[heads]).sum((0, 2)).square().sum().double(),
                         rtol=1e-3, atol=1e-6)
    assert float(found[:, -1].abs().max()) < 1e-8 < float(found[:, 0].min())


def test_what_an_entry_moves_by_going_is_that_of_attention_without_it():
    weights, values, slope = torch.rand(4, 3, 20).softmax(-1), torch.randn(2, 20, 5), torch.randn(4, 3, 5)
    output = weights @ values.repeat_interleave(2, 0)
    found = moves(Reread(0, 22, weights, values, output, slope))
    for entry in (0, 7, 19):
        others = torch.arange(20) != entry
        left = weights[..., others] / weights[..., others].sum(-1, keepdim=True)
        moved = (slope * (left @ values[:, others].repeat_interleave(2, 0) - output)).sum(-1)      # [H, t]
        assert_close(found[..., entry], moved.unflatten(0, (2, 2)).sum(1), rtol=1e-3, atol=1e-5)


def test_odds_rise_as_their_slopes_say():
    model = make("llama").double()
    hidden, step = torch.randn(2, 1, 3, 64).double()

    def odds(size):
        shares = model.lm_head(hidden + size * step).softmax(-1)
        best = model.lm_head(hidden).argmax(-1, keepdim=True)
        return torch.logit(shares.gather(-1, best)).sum()

    found = (losses.odds_slopes(model, hidden) * step).sum()
    assert_close((odds(1e-4) - odds(-1e-4)) / 2e-4, found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_replays_by_odds(family):
    """An entry that nothing depends on scores 0; budgets and the student follow the scores."""
    model = make(family)
    with torch.no_grad():
        block = blocks(model)[0]
        width = block.attn_out.in_features // block.kv_heads
        block.attn_out.module.weight[:, :width] = 0                             # of all query heads of KV head 0
    run = Run([{"input_ids": ids(3, 80), "attention_mask": torch.ones(3, 80, dtype=torch.long)}])
    Replay(pieces=3, length=80, chunk=40, sinks=1, window=4, odds=True).apply(model, run)
    for piece in run.replays:
        assert torch.cat(piece.scores).mean() == pytest.approx(1, rel=1e-4)
        assert piece.scores[0][0].abs().max() == 0 < piece.scores[0][1][piece.free(0)].min()
        assert all(bool((layer[:, :start] == 0).all()) for layer, start in zip(piece.scores, piece.slid, strict=True))
    profile, student = kv.SnapKV(ratio=0.7, window=4, allocate="profile"), kv.KVzap(ratio=0.7, allocate="captured")
    assert all(parts[0][0] == 0 for parts in profile.plan(model, run).meta["parts"])
    kept = student.plan(model, run).meta
    assert all(parts[0][0] == 0 for share, parts in zip(kept["kept"], kept["parts"], strict=True) if share < 0.5)
    with pytest.raises(FieldError, match="plus"):
        Replay(odds=True, plus=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "olmo_hybrid"])
def test_slopes_are_those_of_the_chunk_behind_its_context(family):
    """Of the sum of hidden states, whose change is seen when one output is moved."""
    model, parts, text = make(family), [], ids(1, 40)[0]
    reread(model, text, [5, 6], 16, torch.ones_like, parts.append)
    attending = [index for index, block in enumerate(blocks(model)) if block.attention is not None]
    assert [part.layer for part in parts] == attending * 3
    for part in parts:
        assert_close(part.weights.sum(-1), torch.ones(part.weights.shape[:2]))
        together = part.weights @ part.values.repeat_interleave(len(part.weights) // len(part.values), 0)
        assert_close(part.output, together, rtol=1e-4, atol=1e-5)
    chunk = torch.cat([torch.tensor([5, 6]), text[:16]])
    row = torch.cat([text, chunk])[None]
    seen, places = parts[1 % len(attending)], blocks(model)[attending[1 % len(attending)]].attn_out
    step = torch.randn(seen.output.shape[1], places.in_features)

    def total(size):
        def move(module, args):
            return (torch.cat([args[0][:, :40], args[0][:, 40:] + size * step], 1),)
        handle = places.module.register_forward_pre_hook(move)
        try:
            with torch.no_grad():
                return model.get_decoder()(input_ids=row, use_cache=False)[0][:, 40:].double().sum()
        finally:
            handle.remove()

    slope = seen.slope.transpose(0, 1).flatten(1)                            # [t, H D]
    assert_close((total(1e-3) - total(-1e-3)) / 2e-3, (slope * step).sum().double(), rtol=2e-2, atol=1e-2)


def test_texts_beyond_the_positions_of_a_model_are_refused_by_name():
    model = make("gpt2")
    text = ids(1, model.config.max_position_embeddings - 4)[0]
    with pytest.raises(LlmoptError, match="goes beyond the .* positions of this model"):
        replay_odds(model, text, [], 64)


def test_drawn_tokens_have_slopes_that_cancel_on_average():
    model = make("llama")
    hidden = model.get_decoder()(input_ids=ids(1, 4), use_cache=False)[0].detach()
    drawing = torch.Generator().manual_seed(0)
    many = losses.drawn_slopes(model, hidden.expand(2000, -1, -1), drawing)
    assert float(many.mean(0).norm()) < 0.1 * float(many.norm(dim=-1).mean())   # E[d log p(y)] = 0 for y from p


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_heads_that_nothing_reads_get_what_all_keep(family):
    model, run = replayed(family)
    with torch.no_grad():
        block = blocks(model)[0]
        width = block.attn_out.in_features // block.kv_heads
        block.attn_out.module.weight[:, :width] = 0                             # of all query heads of KV head 0
    record = kv.SnapKV(ratio=0.5, window=4, allocate="fisher").plan(model, run)
    sizes = run.replays[0].sizes()
    assert sizes.tolist() == ([75] * 6 if family == "llama" else [11, 11, 75, 75, 11, 11])          # a window of 16
    for share, parts in zip(record.meta["kept"], record.meta["parts"], strict=True):
        assert_close((torch.tensor(parts).flatten() * sizes).sum(), share * sizes.sum(), rtol=1e-5, atol=1e-5)
        assert share > 0.25 or parts[0][0] == 0
    again = kv.SnapKV(ratio=0.5, window=4, allocate="fisher").plan(model, run)
    assert again.meta == record.meta
    assert model.config._attn_implementation in ("sdpa", "eager")
