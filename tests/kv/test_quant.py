"""The quantized cache: attention over what its codes stand for, codes that stay, bytes, and what it refuses."""
import dataclasses

import pytest
import torch
from llmopt_kernels import NONE, Ragged, Rule, dense, ragged_attention, reference
from torch.testing import assert_close
from transformers import DynamicCache

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.kv import products as products_file
from llmopt.kv import whole as whole_file
from llmopt.kv.codebook import midpoints, normal_levels, rotation
from llmopt.kv.codes import Codes, Form, spread, squeeze
from llmopt.kv.mixed import Mixed
from llmopt.runtime.cache import Entries
from llmopt.runtime.rehearsal import cache_bytes
from tests.tiny import ids, make

CONTRACT = {"bits": 4, "residual": 4, "every": 4}
KINDS = [{}, {"rotate": False, "group_size": 8}, {"codebook": "lloyd", "bits": 3},
         {"keys": "channel", "group_size": 4, "key_bits": 2, "value_bits": 8}]


def quant(**given):
    return kv.Quant(**{"residual": 4, "every": 4, **given})


@torch.no_grad()
def read(model, tokens, sizes, mask=None):
    """The cache and the logits after these turns."""
    cache, out, fed = None, [], 0
    for size in sizes:
        part = slice(fed, fed + size)
        given = {} if mask is None else {"attention_mask": mask[:, :part.stop]}
        result = model(tokens[:, part], past_key_values=cache, use_cache=True, **given)
        cache, fed = result.past_key_values, part.stop
        out.append(result.logits)
    return cache, torch.cat(out, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [16, 20])
def test_codes_lie_side_by_side_in_bytes(bits, dim):
    codes = torch.randint(0, 2 ** bits, (5, dim), dtype=torch.uint8)
    words = squeeze(codes, bits)
    assert torch.equal(spread(words, bits, dim), codes) and words.dtype == torch.uint8
    assert words.shape[1] == (dim * bits / 8 if dim == 16 else {2: 5, 3: 8, 4: 10, 8: 20}[bits])


def test_levels_are_those_of_max_and_the_rotation_is_orthogonal():
    """The table of J. Max, 1960: levels for 2, 4 and 8, the error for 16."""
    assert_close(normal_levels(1), torch.tensor([-0.7979, 0.7979]), atol=1e-4, rtol=0)
    assert_close(normal_levels(2)[2:], torch.tensor([0.4528, 1.510]), atol=1e-3, rtol=0)
    assert_close(normal_levels(3)[4:], torch.tensor([0.2451, 0.7560, 1.344, 2.152]), atol=1e-3, rtol=0)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    levels = normal_levels(4)
    near = levels[torch.bucketize(x, midpoints(levels))]
    assert abs(float((near - x).square().mean()) - 0.009497) < 2e-4
    for dim in (16, 20, 80, 96):
        assert_close(rotation(dim) @ rotation(dim).T, torch.eye(dim), atol=1e-5, rtol=0)
    assert_close(rotation(64).abs(), torch.full((64, 64), 0.125))


def test_codes_by_hand():
    """Two bits without rotation: low, step and nearest code of each group; and a large coordinate with rotation."""
    x = torch.tensor([[0.0, 1.0, 2.2, 3.0, -4.0, -4.0, -4.0, -4.0]])
    codes = Codes.of(x, Form(2, 4, rotate=False))
    assert spread(codes.words, 2, 8).tolist() == [[0, 1, 2, 3, 0, 0, 0, 0]]
    assert codes.scales.tolist() == [[1.0, 0.0]] and codes.lows.tolist() == [[0.0, -4.0]]
    assert_close(codes.dense(), torch.tensor([[0.0, 1.0, 2.0, 3.0, -4.0, -4.0, -4.0, -4.0]]))
    wild = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    wild[:, 3] *= 20
    error = {rotate: float((Codes.of(wild, Form(4, 64, rotate)).dense() - wild).square().mean())
             for rotate in (True, False)}
    by_channel = Codes.of(wild, Form(4, 64, rotate=False, channel=True)).dense()
    assert max(error[True], float((by_channel - wild).square().mean())) < error[False] / 2


@pytest.mark.parametrize("form", [Form(4, 8), Form(3, 4, rotate=False, channel=True)])
def test_any_selection_is_that_of_the_dense_entries(form):
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    old = torch.tensor(([True] * 8 + [False] * 4) * 2)
    mixed = Mixed.of(old, Codes.of(x[old], form), x[~old])
    whole = mixed.dense()
    assert torch.equal(whole[~old], x[~old]) and not torch.equal(whole[old], x[old])
    at = torch.tensor([[23, 0, 5], [9, 9, 14]])
    for index in (slice(0, 24), slice(3, 17), slice(9, 9), slice(8, 12), at, at[0], whole[:, 0] > 0):
        assert_close(mixed[index].dense(), whole[index])
        both = Mixed.cat([mixed[index], mixed[3:17]]).dense()
        assert_close(both, torch.cat([whole[index].view(-1, 16), whole[3:17]]))
    assert_close(mixed[3:17][2:9].dense(), whole[5:12])


@pytest.mark.parametrize("dim, group", [(20, 20), (20, 5), (64, 16), (128, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_and_sums_of_codes_are_those_of_the_dense_entries(bits, dim, group, monkeypatch):
    """Codes in more tiles than one; lanes that are even, all in codes, all dense, uneven, and in no order."""
    generator = torch.Generator().manual_seed(0)
    x, rows = (torch.randn(*shape, dim, generator=generator) for shape in ((60,), (3, 2)))
    weights, place = torch.randn(3, 2, 20, generator=generator), torch.arange(60)
    for form in (Form(bits, group), Form(bits, group, lloyd=True), Form(bits, 10, rotate=False, channel=True)):
        for old in (place % 20 < 10, place < 60, place < 0, place < 30, place % 3 != 1):
            mixed = Mixed.of(old, Codes.of(x[old], form), x[~old])
            for lanes, size in ((3, 7), (3, 25), (1, 7)):
                for file in (products_file, whole_file):
                    monkeypatch.setattr(file, "TILE", size * dim)
                monkeypatch.setattr(whole_file, "LONG", 0 if size == 7 else 1 << 17)
                whole = mixed.dense().view(3, 20, dim)[:lanes]
                some = mixed[:lanes * 20]
                want = rows[:lanes] @ whole.transpose(1, 2), weights[:lanes] @ whole
                for one, other in zip((some.products(rows[:lanes]), some.weighted(weights[:lanes])), want, strict=True):
                    assert_close(one, other, atol=5e-5, rtol=1e-5)


def test_products_in_whole_numbers_are_as_exact_as_those_in_fp32(monkeypatch):
    """Rows whose numbers differ much, one of zeros, one that overflows; the largest number of a row is its unit."""
    monkeypatch.setattr(whole_file, "LONG", 0)
    generator = torch.Generator().manual_seed(0)
    codes = Codes.of(torch.randn(90, 64, generator=generator), Form(4, 64))
    assert whole_file.suits(codes) and not whole_file.suits(Codes.of(torch.randn(8, 64), Form(4, 16)))
    rows = torch.randn(3, 4, 64, generator=generator) * torch.logspace(-3, 3, 64)
    rows[1, 2], rows[2, 1, 5] = 0, torch.inf
    want = rows.double() @ codes.dense().double().view(3, 30, 64).transpose(1, 2)
    got, fp32 = products_file.products(codes, rows), rows @ codes.dense().view(3, 30, 64).transpose(1, 2)
    assert float((got - want)[:2].abs().max()) < 4 * float((fp32 - want)[:2].abs().max())
    assert not bool(got[1, 2].any()) and not bool(got[2, 1].isfinite().any())


def test_a_gradient_goes_through_products_with_codes():
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    mixed = Mixed.of(torch.arange(12) < 9, Codes.of(x[:9], Form(4, 8)), x[9:])
    rows, weights = torch.ones(1, 2, 8, requires_grad=True), torch.ones(1, 2, 12, requires_grad=True)
    (mixed.products(rows).sum() + mixed.weighted(weights).sum()).backward()
    assert_close(rows.grad[0, 0], mixed.dense().sum(0))
    assert_close(weights.grad[0, 0], mixed.dense().sum(1))


@pytest.mark.parametrize("rule", [Rule(0.25), Rule(0.25, softcap=0.5), Rule(0.25, window=9)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_packed_attention_is_attention_over_the_dense_entries(rule, biased):
    """Uneven heads, two queries, of which the first may not see the last tail entry."""
    generator = torch.Generator().manual_seed(0)
    q, *tail = (torch.randn(1, many, size, 16, generator=generator) for many, size in ((4, 2), (2, 3), (2, 3)))
    x, old, form = torch.randn(2, 14, 16, generator=generator), torch.arange(14) % 7 < 4, Form(4, 16)
    mixed = [Mixed.of(old, Codes.of(part[old], form), part[~old]) for part in x]
    places, carried = torch.tensor([*range(7), *range(3, 10)]), {}
    if biased:
        carried["bias"] = torch.randn(14, generator=generator)
    visible = torch.tensor([[[True, True, False], [True, True, True]]])
    packed, plain = (Ragged(*xs, places, torch.tensor([[5, 9]]), carried) for xs in (mixed, [m.dense() for m in mixed]))
    for seen in (visible, None):
        want = reference.ragged_attention(q, plain, tuple(tail), seen, 12, rule)
        assert_close(ragged_attention(q, packed, tuple(tail), seen, 12, rule), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("family, changes", [("llama", {}), ("mistral", {"sliding_window": 20})])
def test_attention_is_that_of_a_dense_run_on_the_dequantized_entries(given, family, changes):
    """The stock model, its cache filled by hand with what the codes stand for; the sliding window is shorter."""
    model, tokens = make(family, **changes), ids(2, 36)
    with runtime.attached(model, quant(**given)):
        cache, first = read(model, tokens, [30])
        by_hand = DynamicCache()
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer.kept.keys, Mixed) and int(layer.kept.keys.old.sum()) > 0
            size = layer.kept.counts[0, 0]
            by_hand.update(*(dense(x).view(2, 2, size, 16) for x in (layer.kept.keys, layer.kept.values)), index)
        with torch.no_grad():
            got = model(tokens[:, 30:31], past_key_values=cache).logits
    with torch.no_grad():
        place = torch.full((2, 1), 30)
        mask = torch.zeros(2, 1, 1, int(size) + 1)
        if changes:                                     # what a query at 30 may see: positions from 11 on
            mask[..., :-1].masked_fill_((layer.kept.positions[:size] <= 10), -torch.inf)
        want = model(tokens[:, 30:31], past_key_values=by_hand, position_ids=place, attention_mask=mask).logits
        plain, whole = read(model, tokens, [30, 1])
    assert_close(first, whole[:, :30], atol=1e-4, rtol=1e-4)       # the prompt itself is read densely
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert float((got - whole[:, 30:]).abs().max()) > 1e-4


@pytest.mark.parametrize("given", KINDS)
def test_what_is_in_codes_stays_as_it_is(given):
    """Bytes of the entries that were packed after the prompt, after turns, decoding and eviction."""
    model, tokens = make("llama"), ids(1, 60)
    for evictor in ((), (kv.Streaming(budget=24, sinks=4, every=4),), (kv.Knorm(budget=24, every=4),)):
        with runtime.attached(model, *evictor, quant(**given)):
            cache, _ = read(model, tokens[:, :30], [30])
            before, seen = held(cache), 30
            for size in (8, *[1] * 9, 6):
                with torch.no_grad():
                    model(tokens[:, seen:seen + size], past_key_values=cache)
                seen += size
        after = held(cache)
        common = before.keys() & after.keys()
        assert len(common) >= 3 * 2 * 2 * 4 and all(torch.equal(before[key], after[key]) for key in common)
        assert len(after.keys() - before.keys()) > 12


def held(cache):
    """(layer, head, position, which) -> the entry's bytes, scales and lows, where it is in codes."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for which, x in (("keys", layer.kept.keys), ("values", layer.kept.values)):
            for _, head, where in layer.kept.heads():
                part = x[where]
                for place in part.old.nonzero().flatten().tolist():
                    codes = part[place:place + 1].codes
                    data = [codes.words.flatten().float(), codes.scales.flatten().float()]
                    data += [] if codes.lows is None else [codes.lows.flatten().float()]
                    found[index, head, int(layer.kept.positions[where][place]), which] = torch.cat(data)
    return found


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("evictor", [(), (kv.SnapKV(ratio=0.5, window=4, allocate="ada"),), (kv.Expected(ratio=0.5),),
                                     (kv.SnapKV(ratio=0.5, window=4, reduce="merge"),)], ids=str)
def test_a_padded_batch_is_its_single_rows_over_several_turns(given, evictor):
    model, tokens, sizes = make("llama"), ids(2, 44), [26, 1, 1, 10, *[1] * 6]
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with runtime.attached(model, *evictor, quant(**given)):
        _, both = read(model, tokens, sizes, mask)
        _, alone = read(model, tokens[1:, 7:], [19, *sizes[1:]])
    assert_close(both[1, 7:], alone[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_close_to_dense(dtype):
    model, tokens, sizes = make("llama", dtype), ids(2, 44), [26, 1, 1, 10, *[1] * 6]
    _, want = read(model, tokens, sizes)
    errors = {}
    for bits in (8, 4, 2):
        with runtime.attached(model, kv.SnapKV(budget=100), quant(bits=bits)):
            _, got = read(model, tokens, sizes)
        errors[bits] = float((got - want).float().norm() / want.float().norm())
    assert errors[8] < (0.01 if dtype == torch.float32 else 0.03) and errors[8] < errors[4] < errors[2]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_the_bits_and_the_scales(bits):
    model, tokens = make("llama", torch.bfloat16), ids(2, 250)
    plain = read(model, tokens, [250])[0]
    numbers = sum(layer.keys.numel() for layer in plain.layers)                          # of the keys alone
    for given, scales in (({}, 2 * 4), ({"codebook": "lloyd"}, 2 * 2), ({"keys": "channel", "group_size": 16}, 2 * 4)):
        with runtime.attached(model, quant(bits=bits, residual=0, **given)):
            cache = read(model, tokens, [250])[0]
        entries = [layer.kept for layer in cache.layers]
        positions = sum(k.positions.nbytes + k.counts.nbytes for k in entries)
        rest = sum(k.keys.new.nbytes for k in entries)                                   # channels: no whole run yet
        packed = numbers - rest // 2
        want = (numbers + packed) * bits / 8 + rest + scales * numbers / 16
        want += sum(3 * k.counts.numel() * (16 * 2 + 4) for k in entries if "keys" not in given)     # centres of runs
        assert abs(cache.nbytes() - positions - want) < 0.02 * want


def test_without_a_rotation_or_a_codebook_there_is_a_word_for_it():
    for bad in ({"bits": 5}, {"bits": 16}, {"key_bits": 1}):
        with pytest.raises(LlmoptError, match=next(iter(bad))):
            kv.Quant(**bad)
    for bad in ({"rotate": False}, {"keys": "channel"}):
        with pytest.raises(LlmoptError, match="codebook: 'lloyd' given, uniform without a rotation"):
            kv.Quant(codebook="lloyd", **bad)
    wanted = "group_size: 12 given, a divisor of the head's 16 numbers expected; nearest"
    with pytest.raises(LlmoptError, match=wanted), runtime.attached(make("llama"), kv.Quant(group_size=12)):
        pass


def test_entries_of_another_form_are_packed_anew():
    model, tokens = make("llama"), ids(1, 40)
    with runtime.attached(model, quant(bits=8)):
        cache, _ = read(model, tokens, [30])
    with runtime.attached(model, quant(bits=2)), torch.no_grad():
        model(tokens[:, 30:], past_key_values=cache)
    assert {layer.kept.keys.codes.form.bits for layer in cache.layers} == {2}


def test_keys_and_values_have_bits_of_their_own_and_the_newest_real_tokens_stay_dense():
    """One row with padding behind its tokens: its newest tokens are not the last columns."""
    model, tokens = make("llama"), ids(2, 40)
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0
    with runtime.attached(model, quant(bits=8, key_bits=4, value_bits=2, residual=6)):
        kept = read(model, tokens, [40], mask)[0].layers[0].kept
    assert (kept.keys.codes.form.bits, kept.values.codes.form.bits) == (4, 2)
    for row, _, where in kept.heads():
        last = 30 if row else 40
        assert kept.positions[where][~kept.keys[where].old].tolist() == list(range(last - 6, last))


@pytest.mark.parametrize("evictor", [kv.SnapKV(ratio=0.5, window=4), kv.Knorm(ratio=0.75),
                                     kv.KeyDiff(ratio=0.6, allocate="ada")], ids=str)
@torch.no_grad()
def test_each_head_keeps_its_newest_entries_dense_so_that_the_bytes_are_foretold(evictor):
    """Whichever tokens a head keeps: noise and the model's own keys come to the same bytes."""
    model = make("llama")
    with runtime.attached(model, evictor, quant(residual=6)):
        cache = read(model, ids(1, 96), [96])[0]
        for layer in cache.layers:
            for _, _, where in layer.kept.heads():
                assert layer.kept.keys[where].old.tolist() == [True] * (where.stop - where.start - 6) + [False] * 6
        assert cache.nbytes() == pytest.approx(cache_bytes(model, 96), rel=0.02)


def test_merged_entries_are_packed_anew():
    """What was in codes takes in what is dropped later, and its codes are then those of the sum."""
    model, tokens, sizes = make("llama"), ids(1, 60), [30, 30]
    merging = kv.SnapKV(budget=12, window=4, reduce="merge")
    with runtime.attached(model, merging):
        plain = read(model, tokens, sizes)[0].layers[0].kept
    with runtime.attached(model, merging, quant(bits=8, residual=0)):
        kept = read(model, tokens, sizes)[0].layers[0].kept
    assert torch.equal(kept.positions, plain.positions) and int((kept.positions < 30).sum()) > 4
    assert_close(kept.values.dense(), plain.values, atol=0.02 * float(plain.values.abs().max()), rtol=0)


def test_merged_entries_lose_their_source():
    before = Entries(torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.tensor([[0, 1, NONE]]),
                     {"source": torch.tensor([[1, 2, 0]])})
    values = before.values.clone()
    values[0, 1] += 1
    after = dataclasses.replace(before, values=values).traced_from(before)
    assert after.carried["source"].tolist() == [[1, 0, 0]]
