"""A-shape: its pattern, its counters, and that it reads nothing else."""
import pytest
import torch
from llmopt_kernels import dense_attention
from torch.testing import assert_close

from llmopt import attention, kv, runtime
from llmopt.attention.a_shape import a_shape_pairs, window_for
from llmopt.attention.sequences import causal_pairs
from llmopt.errors import FieldError
from llmopt.runtime import hooks
from llmopt.runtime.attach import frozen
from tests.tiny import ids, make

CONTRACT = {"sinks": 2, "window": 8, "min_length": 0}       # fields for tests/test_contract.py
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt",
            "qwen3_moe"]


def build(family):
    if family == "gemma2":
        return make(family, attn_logit_softcapping=5.0, _attn_implementation="eager")
    return make(family, **({"sliding_window": 12} if family == "mistral" else {}))


def positions_of(model, mask):
    return {} if model.config.model_type == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_coverage_is_dense(family):
    model, tokens = build(family), ids(2, 50)
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    more = dict(attention_mask=mask, **positions_of(model, mask))
    want = model(tokens, **more).logits[mask.bool()]
    with runtime.attached(model, attention.AShape(sinks=3, window=50, min_length=0)):
        assert_close(model(tokens, use_cache=False, **more).logits[mask.bool()], want, atol=1e-5, rtol=1e-5)
        assert runtime.attachment(model).stats[0].density.tolist() == [1.0] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_masked_dense_run(family, monkeypatch):
    model, tokens = build(family), ids(2, 150)

    def masked(query, keys, values, mask, first, rule):
        i, j = torch.arange(150)[:, None], torch.arange(150)
        visible = (j <= i) & ((j < 3) | (i - j < 9)) & ((i - j < rule.window) if rule.window else True)
        group = query.shape[1] // keys.shape[1]
        logits = query @ keys.repeat_interleave(group, 1).mT * rule.scaling
        logits = rule.softcap * torch.tanh(logits / rule.softcap) if rule.softcap else logits
        return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values.repeat_interleave(group, 1)

    with runtime.attached(model, attention.AShape(sinks=3, window=9, min_length=0)):
        got = model(tokens).logits
        pieces = model(tokens[:, :70], use_cache=True)
        rest = model(tokens[:, 70:], past_key_values=pieces.past_key_values)
    assert_close(torch.cat([pieces.logits, rest.logits], 1), got, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(hooks, "dense_attention", masked)
    with runtime.attached(model, kv.Streaming(budget=1000)):
        assert_close(got, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_padded_row_equals_the_prompt_alone():
    model, tokens = build("llama"), ids(2, 60)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    with runtime.attached(model, attention.AShape(sinks=2, window=7, min_length=0)):
        batch = model(tokens, attention_mask=mask, **positions_of(model, mask)).logits
        assert_close(batch[1:, 20:], model(tokens[1:, 20:]).logits, atol=1e-5, rtol=1e-5)


def test_density_is_counted_and_ratio_sets_it():
    model, tokens = build("llama"), ids(1, 200)
    with runtime.attached(model, attention.AShape(sinks=3, window=9, min_length=0)):
        model(tokens)
        counter = runtime.attachment(model).stats[2]
        assert counter.causal == 200 * 201 // 2 and counter.computed.tolist() == [a_shape_pairs(200, 3, 9)] * 4
    with runtime.attached(model, attention.AShape(sinks=4, ratio=0.7, min_length=0)):
        model(tokens)
        density = runtime.attachment(model).stats[0].density
        assert bool((density >= 0.3).all() and (density < 0.31).all())


def test_pairs_by_counting():
    for length, sinks, window in [(10, 2, 3), (10, 0, 1), (4, 3, 3), (30, 5, 8)]:
        by_hand = sum(j < sinks or i - j < window for i in range(length) for j in range(i + 1))
        assert a_shape_pairs(length, sinks, window) == by_hand
    assert window_for(10, 2, 1.0) == 8 and a_shape_pairs(10, 2, 8) == 55
    for first, length, window in [(0, 10, None), (4, 10, None), (0, 10, 3), (4, 10, 3), (1, 10, 3), (2, 4, 9)]:
        by_hand = sum(i - j < (window or 99) for i in range(first, length) for j in range(i + 1))
        assert causal_pairs(first, length, window) == by_hand


def test_short_prompts_and_small_gains_are_dense():
    model, tokens = build("llama"), ids(1, 100)
    want = model(tokens).logits
    for method in (attention.AShape(sinks=2, window=5), attention.AShape(sinks=2, window=60, min_length=50)):
        with runtime.attached(model, method):
            assert_close(model(tokens).logits, want, atol=1e-5, rtol=1e-5)
            assert runtime.attachment(model).stats[0].density.tolist() == [1.0] * 4
    with runtime.attached(model, attention.AShape(sinks=2, window=5, min_length=50)):
        assert not torch.allclose(model(tokens).logits, want, atol=1e-2)


def test_eviction_after_sparse_prefill_and_generate():
    model, tokens = build("llama"), ids(2, 90)
    parts = attention.AShape(sinks=2, window=20, min_length=0), kv.SnapKV(budget=16, window=8)
    with runtime.attached(model, *parts):
        out = model.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
        assert out.past_key_values.kept()[0].tolist() == [[20, 20]] * 2
        assert float(runtime.attachment(model).stats[0].density[0]) < 0.5
        steps = runtime.runtime_config(model)["steps"]
        assert [next(iter(s["method"])) for s in steps] == ["attention.a_shape", "kv.snapkv"]


@pytest.mark.parametrize("given, key", [(dict(sinks=-1), "sinks"), (dict(window=0), "window"),
                                        (dict(ratio=1.0), "ratio"), (dict(min_length=-1), "min_length")])
def test_a_bad_field_is_named(given, key):
    with pytest.raises(FieldError, match=key):
        attention.AShape(**given)


def test_dense_attention_is_the_module_that_is_replaced():
    assert hooks.dense_attention is dense_attention


def test_the_last_tokens_read_everything():
    """As if they came in a forward of their own, read densely."""
    model, tokens = build("llama"), ids(2, 60)
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    more = dict(attention_mask=mask, **positions_of(model, mask))
    fields = {"sinks": 2, "window": 7, "min_length": 0}
    with runtime.attached(model, attention.AShape(**fields)):
        early = model(tokens[:, :50], attention_mask=mask[:, :50], use_cache=True,
                      position_ids=more["position_ids"][:, :50])
        with frozen(model):
            late = model(tokens[:, 50:], past_key_values=early.past_key_values, attention_mask=mask,
                         position_ids=more["position_ids"][:, 50:])
    with runtime.attached(model, attention.AShape(**fields, last=10)):
        got = model(tokens, use_cache=True, **more).logits
        assert runtime.attachment(model).stats[1].computed.tolist() == [
            sum(a_shape_pairs(n - 10, 2, 7) + sum(range(n - 9, n + 1)) for n in (60, 40))] * 4
    assert_close(got[:, 20:], torch.cat([early.logits, late.logits], 1)[:, 20:], atol=1e-5, rtol=1e-5)
    want = model(tokens, **more).logits
    with runtime.attached(model, attention.AShape(**fields, last=60)):
        assert_close(model(tokens, **more).logits[:, 20:], want[:, 20:], atol=1e-5, rtol=1e-5)
