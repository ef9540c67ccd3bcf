"""Sparse prefill serves every sequence of a batch as if it were alone: padding, turns, eviction, packing, masks."""
import pytest
import torch
from llmopt_kernels import NONE, Rule
from torch.testing import assert_close

from llmopt import attention, kv, runtime
from llmopt.attention.packed import packed_sequences
from llmopt.errors import LlmoptError
from tests.tiny import ids, make

SPARSE = dict(sinks=2, window=4, min_length=0)
KEPT = {"nothing": None, "streaming": kv.Streaming(budget=20, sinks=2), "snapkv": kv.SnapKV(ratio=0.4, window=4),
        "ada": kv.SnapKV(budget=16, window=4, allocate="ada"),
        "global": kv.SnapKV(budget=16, window=4, allocate="global")}


def build(family):
    return make(family, **({"sliding_window": 12} if family == "mistral" else {}))


def turns(model, rows):
    """Logits of every row's real tokens, turn by turn: rows[r][t] are its tokens in turn t, padded on the left."""
    cache, mask, told = None, torch.zeros(len(rows), 0, dtype=torch.long), []
    for given in zip(*rows, strict=True):
        width = max(map(len, given))
        tokens = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in given])
        real = torch.stack([torch.arange(width) >= width - len(x) for x in given])
        mask = torch.cat([mask, real.long()], 1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        out = model(tokens, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        told.append([logits[there] for logits, there in zip(out.logits, real, strict=True)])
    return [torch.cat(row) for row in zip(*told, strict=True)]


def counted(model):
    return {layer: counter.causal for layer, counter in runtime.attachment(model).stats.items()}


@pytest.mark.parametrize("family, evictor", [("llama", name) for name in KEPT] + [
    ("gemma3_text", "nothing"), ("mistral", "streaming"), ("gpt2", "streaming")])
def test_a_row_is_what_it_is_alone_in_every_turn(family, evictor):
    lengths = [(30, 30, 8), (12, 30, 20), (3, 1, 40)]
    if family != "llama":
        lengths = [(*first, 0) for first in ((30, 30), (12, 30), (3, 30))]     # windows count columns: no holes later
    rows = [[ids(1, n, seed=7 * r + t)[0] for t, n in enumerate(row) if n] for r, row in enumerate(lengths)]
    model, parts = build(family), [attention.AShape(**SPARSE), *filter(None, [KEPT[evictor]])]
    with runtime.attached(model, *parts):
        together, pairs = turns(model, rows), counted(model)
        runtime.attachment(model).stats.clear()
        alone = [turns(model, [row])[0] for row in rows]
        assert pairs == counted(model)
    for got, want in zip(together, alone, strict=True):
        assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_later_prompt_is_sparse_though_entries_were_dropped():
    model, first, second = make("llama"), ids(1, 30), ids(1, 200, seed=2)
    density, cache = {}, None
    with runtime.attached(model, attention.AShape(**SPARSE), kv.Streaming(budget=20, sinks=2)):
        for name, tokens in (("first", first), ("second", second)):
            runtime.attachment(model).stats.clear()
            cache = model(tokens, past_key_values=cache).past_key_values
            counter = runtime.attachment(model).stats[0]
            density[name] = counter.computed.tolist()[0], counter.causal
    own = sum(min(i + 1, 4) + min(2, max(0, i - 3)) for i in range(30))
    assert density["first"] == (own, 30 * 31 // 2)
    # sinks 0 and 1 are read densely; of the run from 12 on, its last four
    assert density["second"] == (200 * 2 + 200 * 4, 200 * 20 + 200 * 201 // 2)


def test_a_row_is_dense_by_its_own_length():
    model, long, short = make("llama"), ids(1, 60)[0], ids(1, 30, seed=2)[0]
    with runtime.attached(model, attention.AShape(sinks=2, window=4, min_length=40)):
        together, alone = turns(model, [[long], [short]]), [turns(model, [[row]])[0] for row in (long, short)]
        counter = runtime.attachment(model).stats[0]
    dense = model(short[None]).logits[0]
    assert_close(together[1], dense, atol=1e-5, rtol=1e-5)
    assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], model(long[None]).logits[0], atol=1e-2)
    assert counter.causal == 2 * (60 * 61 // 2 + 30 * 31 // 2)
    assert counter.computed.tolist() == [2 * (30 * 31 // 2 + sum(min(i + 1, 6) for i in range(60)))] * 4


# ------------------------------------------------------------------------------------ packed sequences, 4-D masks


def packed(parts):
    return torch.cat(parts, 1), torch.cat([torch.arange(p.shape[1]) for p in parts])[None]


def block_mask(lengths, dtype=torch.bool):
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    shown = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    if dtype == torch.bool:
        return shown[None, None]
    return torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)[None, None]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral"])
def test_packed_sequences_are_served_one_by_one(family):
    model = build(family)
    parts = [ids(1, n, seed=n) for n in (25, 1, 40)]
    tokens, positions = packed(parts)
    with runtime.attached(model, attention.AShape(**SPARSE)):
        got, pairs = model(tokens, position_ids=positions, use_cache=False).logits, counted(model)
        runtime.attachment(model).stats.clear()
        alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
        assert pairs == counted(model)
        assert_close(got, alone, atol=1e-5, rtol=1e-5)
        assert bool((runtime.attachment(model).stats[0].density < 0.6).all())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_4d_mask_of_packed_sequences_is_read(dtype):
    model, parts = make("llama"), [ids(1, n, seed=n) for n in (25, 40)]
    tokens, positions = packed(parts)
    with runtime.attached(model, attention.AShape(**SPARSE)):
        got = model(tokens, position_ids=positions, attention_mask=block_mask([25, 40], dtype)).logits
        assert_close(got, torch.cat([model(part).logits for part in parts], 1), atol=1e-5, rtol=1e-5)


def test_a_4d_mask_of_a_later_turn_is_read():
    model, tokens = make("llama"), ids(2, 50)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    with runtime.attached(model, attention.AShape(**SPARSE)):
        want = model(tokens).logits
        cache = model(tokens[:, :30], attention_mask=causal[:, :, :30, :30]).past_key_values
        got = model(tokens[:, 30:], attention_mask=causal[:, :, 30:], past_key_values=cache).logits
        assert_close(got, want[:, 30:], atol=1e-5, rtol=1e-5)
        with pytest.raises(LlmoptError, match="49 columns, 50 tokens"):
            cache = model(tokens[:, :30]).past_key_values
            model(tokens[:, 30:], attention_mask=causal[:, :, 30:, :49], past_key_values=cache)



@pytest.mark.parametrize("mask, fact", [
    (torch.ones(1, 1, 20, 20, dtype=torch.bool), "not causal"),
    (torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(), "not causal"),
    (torch.ones(20, 20).tril().log()[None, None] - 0.5, "adds numbers"),
    (torch.ones(1, 4, 20, 20, dtype=torch.bool).tril() & (torch.arange(4) > 0)[:, None, None], "head to head")])
def test_other_4d_masks_are_refused_with_what_to_pass(mask, fact):
    model, tokens = make("llama"), ids(1, 20)
    with runtime.attached(model, attention.AShape(**SPARSE)), \
            pytest.raises(LlmoptError, match=fact + ".*attention.a_shape.*2-D attention_mask, position_ids"):
        model(tokens, attention_mask=mask)


def test_sequences_of_a_mask_by_hand():
    mask = block_mask([2, 3])[0, 0]
    mask[0] = mask[:, 0] = False                                            # padding in front
    assert packed_sequences(mask[None, None], Rule(1.0))[0].tolist() == [[NONE, 0, 1, 1, 1]]
    assert packed_sequences(mask[None, None, 3:], Rule(1.0))[0].tolist() == [[NONE, NONE, 0, 0, 0]]
    near = mask & (torch.arange(5)[:, None] - torch.arange(5) < 2)
    assert packed_sequences(near[None, None], Rule(1.0, window=2))[1].window == 2
    assert packed_sequences(mask[None, None], Rule(1.0, window=2))[1].window is None
    with pytest.raises(LlmoptError, match="not causal"):
        packed_sequences(near[None, None], Rule(1.0))


@pytest.mark.parametrize("evictor", ["ada", "streaming"])
def test_full_coverage_of_what_is_kept_is_dense(evictor):
    """In later turns too, and where a mask of a later turn hides tokens of an earlier one."""
    model, tokens, more, got = make("llama"), ids(2, 40), ids(2, 30, seed=2), []
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, 30:40] = mask[1, :5] = 0
    for parts in ([], [attention.AShape(sinks=0, window=100, min_length=0)]):
        with runtime.attached(model, *parts, KEPT[evictor]):
            cache = model(tokens).past_key_values
            got.append(model(more, past_key_values=cache, attention_mask=mask).logits)
            density = [counter.density for counter in runtime.attachment(model).stats.values()]
    assert_close(got[1], got[0], atol=1e-5, rtol=1e-5)
    assert torch.stack(density).tolist() == [[1.0] * 4] * 3
