"""How a cache may be used: masks of later calls, other models, forwards that died, what generate and torch offer."""
import copy
import pickle
import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import StaticCache

from llmopt import attention, kv, runtime
from llmopt.errors import LlmoptError
from tests.tiny import ids, make

SMALL = dict(budget=10, window=4, sinks=2)
ALLOCATIONS = ["uniform", "ada", "global", "pyramid", "prefix"]


def padded(rows=2, length=24, pads=6):
    tokens = ids(rows, length)
    mask = torch.ones_like(tokens)
    mask[1:, :pads] = 0
    return tokens, mask


# ------------------------------------------------------------------------------------------ masks of later calls

def conversation(model):
    """Logits of a padded prompt's later turns, whose masks hide more and more of it, some rows repeated on the way."""
    tokens, mask = padded()
    turns = [ids(2, 1, 5), ids(3, 5, 6), ids(3, 1, 7)]
    places, out = (mask.cumsum(-1) - 1).clamp(min=0), []
    cache = model(tokens, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
    mask[0, 4:12] = 0                                       # with what Streaming drops: 4 to 10 in the longer row
    mask[1, 10:13] = 0                                      # and 10, its fifth token, in the shorter one
    for turn in turns:
        if len(turn) != len(mask):
            rows = torch.tensor([1, 0, 1])
            cache.batch_select_indices(rows)
            mask, places = mask[rows], places[rows]
            mask[2, 14:16] = 0
        new = torch.ones_like(turn)
        mask, place = torch.cat([mask, new], 1), places[:, -1:] + new.cumsum(-1)
        places = torch.cat([places, place], 1)
        with runtime.frozen(model):
            out.append(model(turn, attention_mask=mask, position_ids=place, past_key_values=cache).logits)
    return out


@pytest.mark.parametrize("family, changes", [("llama", {}), ("mistral", {"sliding_window": 18}), ("gemma2", {})])
@torch.no_grad()
def test_a_later_mask_hides_kept_entries(family, changes):
    """What Streaming drops is hidden by all masks, so that the stock model reads the same."""
    model = make(family, **({"_attn_implementation": "eager"} if family == "gemma2" else {}), **changes)
    want = conversation(model)
    with runtime.attached(model, kv.Streaming(budget=17)):
        got = conversation(model)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_hidden_tokens_are_dropped_at_the_next_compression_and_cannot_be_shown_again():
    model, tokens = make("llama"), ids(1, 40)
    mask = torch.ones(1, 50, dtype=torch.long)
    mask[:, 2:20] = 0
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        cache = model(tokens, use_cache=True).past_key_values
        one = model(tokens[:, :1], attention_mask=mask[:, :41], past_key_values=cache).past_key_values
        hidden = model(tokens[:, :9], attention_mask=mask, past_key_values=one.fork()).past_key_values
        assert all(not set(range(2, 20)) & set(layer.kept.positions.tolist()) for layer in hidden.layers)
        assert hidden.kept()[0].tolist() == [[10, 10]]
        shown = torch.ones(1, 51, dtype=torch.long)
        with pytest.raises(LlmoptError, match="hidden when the cache was compressed"):
            model(tokens[:, :1], attention_mask=shown, past_key_values=hidden)
        model(tokens[:, :1], past_key_values=hidden)                            # nothing was done to the cache
        model(tokens[:, :1], attention_mask=shown[:, :42], past_key_values=one)     # only hidden for a while


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@torch.no_grad()
def test_rows_without_a_token_in_sight_are_left_alone(allocate):
    """Right padding empties a window of 16; a turn of padding only asks no question; a hidden row holds nothing."""
    model, tokens = make("gemma3_text"), ids(2, 40)
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, 12:] = 0
    with runtime.attached(model, kv.SnapKV(budget=8, window=4, allocate=allocate)):
        cache = model(tokens, attention_mask=mask[:, :40], use_cache=True).past_key_values
        alone = model(tokens[1:, :12], use_cache=True).past_key_values
        if allocate in ("uniform", "ada"):
            assert cache.kept()[1][1].tolist() == alone.kept()[1][0].tolist()
        cache = model(tokens[:, :8], attention_mask=mask, past_key_values=cache).past_key_values
        if allocate == "uniform":
            assert cache.kept()[1][1].tolist() == [8, 8]
        mask = torch.cat([mask * 0, torch.ones(2, 2, dtype=torch.long)], 1)
        assert bool(model(tokens[:, :2], attention_mask=mask, past_key_values=cache).logits.isfinite().all())


# ------------------------------------------------------------------------------- other models, forwards that died

def test_a_cache_is_refused_where_it_would_be_misread():
    model, other, tokens = make("llama"), make("llama", seed=3), ids(1, 24)
    with runtime.attached(model, kv.SnapKV(**SMALL)), runtime.attached(other, kv.SnapKV(**SMALL)):
        cache = model(tokens, use_cache=True).past_key_values
        for given in (cache, cache.fork(), copy.deepcopy(cache)):
            with pytest.raises(LlmoptError, match="filled by another model"):
                other(tokens[:, :1], past_key_values=given)
        with pytest.raises(LlmoptError, match="holds 1 rows, 2 were given"):
            model(ids(2, 1), past_key_values=cache)
        want = model(tokens[:, :1], past_key_values=cache.fork()).logits
        read = pickle.loads(pickle.dumps(cache))
        model.set_attn_implementation("sdpa")
        for given in ({}, {"past_key_values": cache}, {"use_cache": False}):
            with pytest.raises(LlmoptError, match=r"set_attn_implementation\('sdpa'\) has switched off"):
                model(tokens[:, :1], **given)
        model.set_attn_implementation("llmopt")
        assert torch.equal(model(tokens[:, :1], past_key_values=read).logits, want)
    for given in (cache, cache.fork(), copy.deepcopy(cache)):
        with pytest.raises(LlmoptError, match="has none"):
            model(tokens[:, :1], past_key_values=given)
        with pytest.raises(LlmoptError, match="has none"):
            model.generate(tokens, past_key_values=given, max_new_tokens=2)
    with runtime.attached(model, kv.Streaming(budget=20)):
        assert torch.equal(model(tokens[:, :1], past_key_values=cache).logits, want)


class Stop(BaseException):
    """As KeyboardInterrupt: no `except Exception` sees it."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_a_cache_whose_forward_died_is_refused(error):
    model, tokens = make("llama"), ids(2, 24)

    def die(*args):
        raise error("died")

    with runtime.attached(model, kv.SnapKV(**SMALL)):
        want = model(tokens, use_cache=True)
        cache = want.past_key_values
        handle = model.model.layers[1].mlp.register_forward_hook(die)
        with pytest.raises(error):
            model(tokens[:, :2], past_key_values=cache)
        handle.remove()
        for broken in (cache, cache.fork(), copy.deepcopy(cache)):
            with pytest.raises(LlmoptError, match="failed in the middle"):
                model(tokens[:, :2], past_key_values=broken)
        assert torch.equal(model(tokens, use_cache=True).logits, want.logits)
        cache.reset()
        assert torch.equal(model(tokens, past_key_values=cache).logits, want.logits)
    if error is Stop:
        with pytest.raises(LlmoptError, match="has none"):
            model(tokens[:, :2], past_key_values=broken)


def test_a_forward_that_is_refused_before_the_first_layer_leaves_the_cache_as_it_was():
    model, (tokens, mask) = make("llama"), padded()
    more = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        want = model(tokens[:, :2], attention_mask=more, past_key_values=cache.fork()).logits
        for bad in (dict(attention_mask=mask), dict(attention_mask=more[:1]),
                    dict(attention_mask=more, position_ids=torch.zeros(5, 2).long())):
            with pytest.raises((LlmoptError, RuntimeError)):
                model(tokens[:, :2], past_key_values=cache, **bad)
        with pytest.raises(IndexError):
            model(tokens[:, :2] + 1000, attention_mask=more, past_key_values=cache)
        assert torch.equal(model(tokens[:, :2], past_key_values=cache).logits, want)        # its own mask goes on


# ------------------------------------------------------------------------------------------ what torch offers

def test_frozen_concerns_its_own_thread():
    model, tokens, found = make("llama"), ids(1, 24), []
    with runtime.attached(model, kv.SnapKV(**SMALL)), runtime.frozen(model):
        thread = threading.Thread(target=lambda: found.append(model(tokens, use_cache=True).past_key_values.kept()))
        thread.start()
        thread.join()
        assert model(tokens, use_cache=True).past_key_values.kept()[0].tolist() == [[24, 24]]
    assert found[0][0].tolist() == [[10, 10]]


@pytest.mark.parametrize("method", [kv.SnapKV(**SMALL), attention.AShape(sinks=2, window=4, min_length=0)])
def test_gradient_checkpointing_gives_the_same_gradients(method):
    model, (tokens, mask) = make("llama").train(), padded()
    found = []
    with runtime.attached(model, method):
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(tokens, attention_mask=mask, labels=tokens).loss.backward()
            found.append([p.grad.clone() for p in model.parameters()])
        with pytest.raises(LlmoptError, match="gradient checkpointing"):
            model(tokens, past_key_values=runtime.new_cache(model))
    assert all(float(g.abs().max()) > 0 for g in found[0])
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_compiled_model_does_what_the_plain_one_does():
    model, (tokens, mask) = make("llama", num_hidden_layers=1), padded()
    runtime.attach(model, kv.SnapKV(**SMALL))
    want = model(tokens, attention_mask=mask, use_cache=True)
    compiled = torch.compile(model, backend="eager")
    got = compiled(tokens, attention_mask=mask, use_cache=True)
    assert_close(got.logits, want.logits)
    assert got.past_key_values.kept()[0].tolist() == [[10, 10], [10, 10]]
    with pytest.raises(LlmoptError, match="23 columns, 24 tokens"):
        compiled(tokens, attention_mask=mask[:, :23])
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------- what generate offers

@pytest.mark.parametrize("kind", ["static", "offloaded_static", "sliding_window", "hybrid_chunked", "offloaded_hybrid",
                                  "offloaded_hybrid_chunked", "offloaded", "quantized", "paged", "mamba"])
def test_other_caches_are_refused_by_name(kind):
    """transformers refuses names that it does not know, and takes `hybrid` for the default by itself."""
    model, tokens = make("llama"), ids(1, 12)
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        with pytest.raises((LlmoptError, ValueError), match=kind):
            model.generate(tokens, cache_implementation=kind, max_new_tokens=2)
        model.generation_config.cache_implementation = kind
        with pytest.raises((LlmoptError, ValueError), match=kind):
            model.generate(tokens, max_new_tokens=2)


def test_other_cache_objects_are_refused_and_ours_need_no_kind():
    model, tokens = make("llama"), ids(1, 12)
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        for given in (StaticCache(model.config, max_cache_len=20), ((tokens, tokens),)):
            with pytest.raises(LlmoptError, match=type(given).__name__):
                model.generate(tokens, past_key_values=given, max_new_tokens=2)
            with pytest.raises(LlmoptError, match=type(given).__name__):
                model(tokens, past_key_values=given)
        with pytest.raises(LlmoptError, match="static"):
            model.generate(tokens, past_key_values=runtime.new_cache(model), cache_implementation="static")
        model.generate(tokens, past_key_values=runtime.new_cache(model), max_new_tokens=2)
        model.generate(tokens, cache_implementation="dynamic", max_new_tokens=2)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()


@pytest.mark.parametrize("how", [dict(num_return_sequences=3, do_sample=True), dict(use_cache=False), dict(embeds=True),
                                 dict(num_beams=4, num_return_sequences=2), dict(prefill_chunk_size=7),
                                 dict(again=True)])
def test_generate_equals_stock_at_a_large_budget(how):
    model, (tokens, mask) = make("llama"), padded()
    how = dict(max_new_tokens=6, attention_mask=mask, pad_token_id=0, eos_token_id=None) | how
    given = {"inputs_embeds": model.get_input_embeddings()(tokens)} if how.pop("embeds", False) else \
        {"input_ids": tokens}
    again = how.pop("again", False)

    def text():
        torch.manual_seed(0)
        out = model.generate(**given, **how, return_dict_in_generate=True)
        if not again:
            return out.sequences
        longer = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        return model.generate(out.sequences, **how | {"attention_mask": longer}, past_key_values=out.past_key_values)

    want = text()
    with runtime.attached(model, kv.SnapKV(budget=200)):
        assert torch.equal(text(), want)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_turns_of_a_padded_batch_equal_stock_whatever_positions_are_left_open(family, columns):
    """Left open, or given as columns: as stock. Counted, as generate gives them, after an open turn: as alone."""
    model, tokens, later = make(family), ids(2, 20), ids(2, 9, 2)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, :8] = 0
    given = {"position_ids": torch.arange(20, 29).expand(2, -1)} if columns else {}

    def turns(**second):
        cache = model(tokens, attention_mask=mask[:, :20], use_cache=True).past_key_values
        return model(later, attention_mask=mask, past_key_values=cache, **second).logits

    expected = turns(**given)
    alone = model(torch.cat([tokens[1:, 8:], later[1:]], 1)).logits[0, 12:]
    with runtime.attached(model, kv.Streaming(budget=64)):
        assert_close(turns(**given), expected, atol=2e-5, rtol=1e-4)
        if family == "llama":
            counted = turns(position_ids=torch.stack([torch.arange(20, 29), torch.arange(12, 21)]))
            assert_close(counted[1], alone, atol=2e-5, rtol=1e-4)
