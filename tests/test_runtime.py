"""The runtime on every family: dense when nothing is dropped, equal to a masked dense run when something is."""
import copy

import pytest
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.model.modeling import SkippedAttn
from llmopt.runtime import hooks
from tests.tiny import ids, make

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "gpt2", "opt",
            "mixtral", "qwen2_moe", "qwen3_moe"]
LENGTH = 40
SMALL = dict(budget=10, window=4, sinks=2)


@pytest.fixture(params=FAMILIES)
def model(request):
    changes = {"sliding_window": 12} if request.param in ("mistral", "mixtral") else {}
    if request.param == "gemma2":
        changes = {"attn_logit_softcapping": 5.0, "_attn_implementation": "eager"}
    return make(request.param, **changes)


def padded(rows=2, length=LENGTH, pads=9):
    """Ids and mask [rows, length]; all rows but the first are left-padded."""
    tokens = ids(rows, length)
    mask = torch.ones_like(tokens)
    mask[1:, :pads] = 0
    return tokens.masked_fill(mask == 0, 0), mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def steps(model, tokens, mask, sizes):
    """Logits [B, T, V] of feeding the tokens in pieces through one cache, and that cache."""
    takes_positions = model.config.model_type != "opt"
    cache, out, start = None, [], 0
    for size in sizes:
        part = slice(start, start + size)
        more = {"position_ids": positions_of(mask)[:, part]} if takes_positions else {}
        with torch.no_grad():
            result = model(tokens[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache, use_cache=True,
                           **more)
        cache, start = result.past_key_values, start + size
        out.append(result.logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("sizes", [[LENGTH], [15, 1, 1, 13, 10], [30] + [1] * 10])
def test_large_budget_is_dense(model, sizes):
    tokens, mask = padded()
    want, _ = steps(model, tokens, mask, [LENGTH])
    with runtime.attached(model, kv.SnapKV(budget=LENGTH)):
        got, cache = steps(model, tokens, mask, sizes)
        assert isinstance(cache, runtime.LlmoptCache)
        uncached = model(tokens, attention_mask=mask, use_cache=False, **(
            {"position_ids": positions_of(mask)} if model.config.model_type != "opt" else {})).logits
    real = mask.bool()
    assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    assert_close(uncached[real], want[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("allocate", ["uniform", "ada", "global"])
def test_padded_row_equals_the_prompt_alone(model, allocate):
    tokens, mask = padded()
    sizes = [24, 1, 1, 9, 1, 4]
    method = kv.SnapKV(**SMALL, allocate=allocate)
    with runtime.attached(model, method):
        batch, cache = steps(model, tokens, mask, sizes)
        alone, single = steps(model, tokens[1:, 9:], mask[1:, 9:], [15, 1, 1, 9, 1, 4])
    assert_close(batch[1:, 9:], alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a[1:], b) for a, b in zip(cache.kept(), single.kept(), strict=True))
    assert int(sum(counts.sum() for counts in cache.kept())) < 2 * LENGTH * sum(c.shape[1] for c in cache.kept())


def held(cache, layer, row):
    """Positions that each KV head of a layer holds."""
    kept = cache.layers[layer].kept
    return [kept.positions[where].tolist() for r, _, where in kept.heads() if r == row]


def test_right_padded_row_keeps_what_the_prompt_alone_keeps():
    model, tokens = make("llama"), ids(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, 31:] = 0
    with runtime.attached(model, kv.SnapKV(**SMALL, allocate="ada")):
        _, cache = steps(model, tokens, mask, [LENGTH])
        _, alone = steps(model, tokens[1:, :31], mask[1:, :31], [31])
    assert all(held(cache, layer, 1) == held(alone, layer, 0) for layer in range(3))


class Oldest(kv.Streaming):
    """Would rather keep what is long gone."""

    def score(self, view):
        return -view.positions.float()


def test_sliding_layers_drop_what_no_query_can_reach():
    model, tokens = make("mistral", sliding_window=12), ids(1, 80)
    with runtime.attached(model, Oldest(budget=9, sinks=0)):
        cache = model(tokens[:, :40], use_cache=True).past_key_values
        first = held(cache, 0, 0)
        for i in range(40, 48):
            cache = model(tokens[:, i:i + 1], past_key_values=cache).past_key_values
        cache = model(tokens[:, 48:50], past_key_values=cache).past_key_values
    assert first == [list(range(29, 38))] * 2 and held(cache, 0, 0) == [list(range(40, 49))] * 2


class Oracle:
    """Records what each layer attends to as masks over all positions, and runs it densely in plain attention."""

    def __init__(self, cache, length):
        self.visible = []
        for layer in cache.layers:
            seen = torch.zeros(*layer.kept.counts.shape, length, dtype=torch.bool)
            for row, head, where in layer.kept.heads():
                seen[row, head, layer.kept.positions[where].long()] = True
            self.visible.append(seen)


@pytest.mark.parametrize("allocate", ["uniform", "ada", "global", "prefix"])
def test_evicted_equals_a_dense_run_masked_the_same_way(model, allocate, monkeypatch):
    tokens = ids(2, LENGTH)
    prompt = 28
    with runtime.attached(model, kv.SnapKV(**SMALL, allocate=allocate)):
        filled = model(tokens[:, :prompt], use_cache=True)
        oracle = Oracle(filled.past_key_values, prompt)
        with runtime.frozen(model):
            got = model(tokens[:, prompt:], past_key_values=filled.past_key_values.fork()).logits
            one = [model(tokens[:, prompt:prompt + 1], past_key_values=filled.past_key_values.fork()).logits]
    total = int(sum(v.sum() for v in oracle.visible))
    assert total < 2 * prompt * sum(v.shape[1] for v in oracle.visible)

    def masked(query, keys, values, mask, first, rule):
        layer = masked.calls % len(oracle.visible)
        masked.calls += 1
        group = query.shape[1] // keys.shape[1]
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        visible = (j <= i) & ((i - j < rule.window) if rule.window else True)
        visible = visible.expand(2, keys.shape[1], -1, -1).clone()
        visible[:, :, prompt:, :prompt] &= oracle.visible[layer][:, :, None]
        logits = query @ keys.repeat_interleave(group, 1).mT * rule.scaling
        if rule.softcap:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        logits = logits.masked_fill(~visible.repeat_interleave(group, 1), -torch.inf)
        return logits.softmax(-1) @ values.repeat_interleave(group, 1)

    masked.calls = 0
    monkeypatch.setattr(hooks, "dense_attention", masked)
    with runtime.attached(model, kv.SnapKV(budget=1000)):
        want = model(tokens, use_cache=False).logits
    assert_close(got, want[:, prompt:], atol=1e-5, rtol=1e-5)
    assert_close(one[0], want[:, prompt:prompt + 1], atol=1e-5, rtol=1e-5)


def snapshot(model):
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    keys = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    return hooks, keys, model.config.to_dict(), model.config._attn_implementation


def test_detach_leaves_no_trace(model):
    tokens, mask = padded()
    blocks(model)                                       # what is found of a model's layers stays with them
    before, want = snapshot(model), model(tokens, attention_mask=mask).logits
    runtime.attach(model, kv.SnapKV(**SMALL))
    steps(model, tokens, mask, [20, 20])
    assert snapshot(model) != before
    runtime.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(tokens, attention_mask=mask).logits, want)


@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=True, top_k=20),
                                 dict(num_beams=3, do_sample=False)])
def test_generate_equals_stock_at_a_large_budget(model, how):
    tokens, mask = padded()
    how = dict(max_new_tokens=12, attention_mask=mask, pad_token_id=0, eos_token_id=None, **how)
    torch.manual_seed(0)
    want = model.generate(tokens, **how)
    with runtime.attached(model, kv.SnapKV(budget=200)):
        torch.manual_seed(0)
        got = model.generate(tokens, **how)
    assert torch.equal(got, want)


def test_generate_evicts_and_beams_follow_their_rows(model):
    tokens, mask = padded()
    how = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0)
    with runtime.attached(model, kv.SnapKV(**SMALL, allocate="ada")):
        batch = model.generate(tokens, attention_mask=mask, num_beams=3, **how)
        alone = model.generate(tokens[1:, 9:], num_beams=3, **how)
    assert batch.past_key_values.layers[0].kept is not None
    assert batch.sequences[1, LENGTH:].tolist() == alone.sequences[0, LENGTH - 9:].tolist()


def storage_bytes(cache):
    tensors = [t for layer in cache.layers for t in layer.tensors()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_bytes_are_those_held_and_memory_is_freed():
    model = make("llama")
    tokens = ids(2, 200)
    with runtime.attached(model, kv.SnapKV(budget=20, window=8)):
        cache = model(tokens, use_cache=True).past_key_values
        assert cache.nbytes() == storage_bytes(cache)
        assert [c.tolist() for c in cache.kept()] == [[[20, 20], [20, 20]]] * 3
        entry = 2 * 16 * 4 + 4                                       # key, value, position
        assert cache.nbytes() == 3 * (2 * 2 * 20 * entry + 2 * 2 * 8)
        assert cache.dense_nbytes() == 3 * 2 * 2 * 200 * 2 * 16 * 4
        grown = model(tokens[:, :1], past_key_values=cache).past_key_values
        assert grown.nbytes() == storage_bytes(grown) > 3 * 2 * 2 * 21 * 2 * 16 * 4
    stock = model(tokens, use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers) == 3 * 2 * 2 * 200 * 2 * 16 * 4


def test_fork_and_frozen_leave_the_compressed_cache_alone():
    model = make("llama")
    tokens = ids(1, 60)
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        cache = model(tokens[:, :50], use_cache=True).past_key_values
        before, held = cache.nbytes(), [t.clone() for layer in cache.layers for t in layer.tensors()]
        with runtime.frozen(model):
            first = model(tokens[:, 50:], past_key_values=cache.fork()).logits
            again = model(tokens[:, 50:], past_key_values=cache.fork()).logits
        assert torch.equal(first, again)
        assert cache.get_seq_length() == 50 and cache.nbytes() == before
        assert all(torch.equal(a, b) for a, b in zip(held, (t for x in cache.layers for t in x.tensors()), strict=True))
        model(tokens[:, 50:], past_key_values=cache)
        assert [c.tolist() for c in cache.kept()] == [[[10, 10]]] * 3


def test_every_compresses_while_decoding():
    model = make("llama")
    tokens = ids(1, 60)
    with runtime.attached(model, kv.SnapKV(**SMALL, every=4)):
        cache = model(tokens[:, :50], use_cache=True).past_key_values
        held = []
        for i in range(50, 60):
            cache = model(tokens[:, i:i + 1], past_key_values=cache).past_key_values
            held.append(int(cache.kept()[0][0, 0]))
    assert held == [11, 12, 13, 10, 11, 12, 13, 10, 11, 12]


def test_skipped_attention_only_counts():
    model = make("llama")
    model.model.layers[0].self_attn = SkippedAttn(0)
    tokens, mask = padded()
    want, _ = steps(model, tokens, mask, [LENGTH])
    with runtime.attached(model, kv.SnapKV(budget=LENGTH)):
        got, cache = steps(model, tokens, mask, [20, 1, 19])
    assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    assert cache.layers[0].tensors() == [] and cache.get_seq_length() == LENGTH
    with runtime.attached(model, kv.SnapKV(**SMALL, allocate="global")):
        _, cache = steps(model, tokens, mask, [LENGTH])
    assert [int(c.sum()) for c in cache.kept()][0] == 0 and sum(int(c.sum()) for c in cache.kept()) == 2 * 2 * 2 * 10


def test_sliding_layers_hold_no_more_than_their_window():
    model = make("mistral", sliding_window=12)
    with runtime.attached(model, kv.SnapKV(budget=100)):
        cache = model(ids(1, 40), use_cache=True).past_key_values
        for i in range(60):
            cache = model(ids(1, 1, seed=i), past_key_values=cache).past_key_values
    assert max(int(c.max()) for c in cache.kept()) <= 2 * 12
    assert cache.get_seq_length() == 100


def test_config_round_trip_and_deep_copy():
    model = make("llama")
    tokens = ids(2, LENGTH)
    runtime.attach(model, kv.SnapKV(**SMALL), Record({}))
    saved = runtime.runtime_config(model)
    want = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert runtime.has_eviction(model) and saved["steps"][0]["method"]["kv.snapkv"]["budget"] == 10
    other = make("llama")
    other.config.llmopt = saved
    runtime.attach_from_config(other)
    runtime.attach_from_config(other)
    twin = copy.deepcopy(model)
    runtime.detach(model)
    assert torch.equal(other.generate(tokens, max_new_tokens=5, do_sample=False), want)
    assert torch.equal(twin.generate(tokens, max_new_tokens=5, do_sample=False), want)
    runtime.detach(twin)
    assert runtime.runtime_config(twin) == {"steps": []} and not runtime.has_eviction(model)


def test_what_cannot_work_is_refused_by_name():
    from transformers import DynamicCache

    model = make("llama")
    tokens = ids(1, 12)
    with pytest.raises(LlmoptError, match="nothing is attached"):
        runtime.new_cache(model)
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        with pytest.raises(LlmoptError, match="kv.snapkv is attached already"):
            kv.Streaming(budget=20).apply(model, Run())
        with pytest.raises(LlmoptError, match="DynamicCache"):
            model(tokens, past_key_values=DynamicCache())
        with pytest.raises(LlmoptError, match="static"):
            model.generate(tokens, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(LlmoptError, match="4-D"):
            model(tokens, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool).tril())
        with pytest.raises(LlmoptError, match="11 columns, 12 tokens"):
            model(tokens, attention_mask=torch.ones(1, 11, dtype=torch.long))
        model(tokens)                        # the failed calls have left nothing behind
    assert runtime.attachment(model) is None


def test_attached_gives_back_what_was_attached_before():
    model = make("llama")
    runtime.attach(model, kv.Streaming(budget=20))
    with pytest.raises(LlmoptError), runtime.attached(model, kv.SnapKV(**SMALL)):
        pass
    assert [s["method"] for s in runtime.runtime_config(model)["steps"]] == [kv.Streaming(budget=20).to_dict()]


def test_a_mask_may_be_left_out_once_known():
    model = make("llama")
    tokens, mask = padded()
    with runtime.attached(model, kv.SnapKV(**SMALL)):
        results = []
        for given in (mask, None):
            cache = model(tokens[:, :30], attention_mask=mask[:, :30], position_ids=positions_of(mask)[:, :30],
                          use_cache=True).past_key_values
            results.append(model(tokens[:, 30:], attention_mask=given, position_ids=positions_of(mask)[:, 30:],
                                 past_key_values=cache).logits)
    assert torch.equal(*results)


@pytest.mark.parametrize("sizes", [[LENGTH], [15, 1, 24]])
def test_the_last_token_can_be_read_again(model, sizes):
    tokens, mask = padded()
    position = {} if model.config.model_type == "opt" else {"position_ids": positions_of(mask)[:, -1:]}
    for method, exact in ((kv.SnapKV(budget=LENGTH), True), (kv.SnapKV(**SMALL), False)):
        with runtime.attached(model, method):
            logits, cache = steps(model, tokens, mask, sizes)
            before = [counts.clone() for counts in cache.kept()]
            with runtime.frozen(model), torch.no_grad():
                again = model(tokens[:, -1:], attention_mask=mask, past_key_values=cache.without_last(), **position)
        assert again.past_key_values.get_seq_length() == LENGTH
        assert all(torch.equal(a, b) for a, b in zip(cache.kept(), before, strict=True))
        same = torch.allclose(again.logits[:, 0], logits[:, -1], atol=1e-5, rtol=1e-5)
        assert same == exact
