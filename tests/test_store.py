"""A store beside the evictor: a cache of int8 codes, against one whose entries are rounded by hand."""
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from llmopt_kernels import NONE, Packed, dense
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.recipe.reader import check_order
from tests.tiny import ids, make


@dataclass(frozen=True)
class Codes(Packed):
    """int8 codes [..., D] with a scale for each entry [..., 1]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, x):
        scales = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return cls((x / scales).round().to(torch.int8), scales)

    def __getitem__(self, index):
        return Codes(self.codes[index], self.scales[index])

    def dense(self):
        return self.codes * self.scales

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]))

    def tensors(self):
        return [self.codes, self.scales]


class Int8(runtime.StoreMethod):
    """The toy store."""

    name, every = "kv.int8", None

    def pack(self, entries, packing):
        packing.shared.setdefault("layers", []).append((packing.layer, packing.row))
        self.seen.append(list(packing.shared["layers"]))
        return dataclasses.replace(entries, keys=Codes.of(entries.keys), values=Codes.of(entries.values))


def store(every=None):
    made = Int8()
    object.__setattr__(made, "every", every)
    object.__setattr__(made, "seen", [])
    return made


class Rounded(kv.SnapKV):
    """SnapKV whose kept entries are rounded by hand after it has chosen, and kept as they are."""

    def _left(self, turn, index, choice):
        left = super()._left(turn, index, choice)
        return dataclasses.replace(left, keys=Codes.of(left.keys).dense(), values=Codes.of(left.values).dense())


def talk(model, tokens, mask):
    """Logits of three turns over a padded batch, the rows changed once, and the cache."""
    cache, out, fed = None, [], 0
    for size in (24, 1, 8, 1):
        if size == 8:
            rows = torch.tensor([1, 0, 1])
            cache.batch_select_indices(rows)
            tokens, mask = tokens[rows], mask[rows]
        part = slice(fed, fed + size)
        result = model(tokens[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache, use_cache=True)
        cache, fed = result.past_key_values, part.stop
        out.append(result.logits)
    return out, cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allocate", ["uniform", "ada", "global"])
@torch.no_grad()
def test_a_packed_cache_is_the_rounded_one(allocate, dtype):
    model, tokens = make("llama", dtype), ids(2, 34)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    given = dict(budget=10, window=4, allocate=allocate)
    with runtime.attached(model, Rounded(**given)):
        want, plain = talk(model, tokens, mask)
    with runtime.attached(model, store(), kv.SnapKV(**given)):
        got, cache = talk(model, tokens, mask)
    with runtime.attached(model, kv.SnapKV(**given)):
        unpacked, _ = talk(model, tokens, mask)
    bound = 1e-4 if dtype == torch.float32 else 0.25
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, atol=bound, rtol=bound)
    assert float((got[1] - unpacked[1]).abs().max()) > 0                                # it did round
    kept, other = cache.layers[0].kept, plain.layers[0].kept
    assert isinstance(kept.keys, Codes) and kept.keys.codes.dtype == torch.int8
    assert torch.equal(kept.positions, other.positions)
    bytes_of = lambda kept: sum(t.nbytes for t in kept.tensors())                       # noqa: E731
    assert bytes_of(other) - bytes_of(kept) == 2 * len(kept.positions) * (15 * dtype.itemsize - 16)


@torch.no_grad()
def test_a_store_acts_alone_and_while_decoding():
    model, tokens, int8 = make("llama"), ids(2, 30), store(every=3)
    with runtime.attached(model, int8):
        assert runtime.has_eviction(model)
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        assert int8.seen[-1] == [(layer, row) for layer in range(3) for row in range(2)]     # one forward's memory
        assert [c.tolist() for c in cache.kept()] == [[[20, 20]] * 2] * 3
        held = []
        for i in range(20, 26):
            cache = model(tokens[:, i:i + 1], past_key_values=cache).past_key_values
            held.append(len(cache.layers[0].kept.positions) // 4)
        assert held == [20, 20, 23, 23, 23, 26]
        again = cache.layers[0].row(0, None)
        assert_close(dense(cache.layers[0].kept.keys)[:26], again.keys[0])
        assert bool((again.positions != NONE).all())
    with runtime.attached(model, store(), kv.SnapKV(budget=100)):                       # an evictor that has no choice
        cache = model(tokens, use_cache=True).past_key_values
        assert isinstance(cache.layers[0].kept.keys, Codes) and cache.kept()[0].tolist() == [[30, 30]] * 2


def test_a_place_holds_one_store_beside_one_evictor():
    model = make("llama")
    with runtime.attached(model, store(), kv.Streaming(budget=10)), pytest.raises(LlmoptError, match="cache store"):
        runtime.attach(model, store())
    check_order((kv.Streaming(budget=10), store()))
    check_order((store(), kv.Streaming(budget=10)))
    with pytest.raises(LlmoptError, match="at most one kv cache store"):
        check_order((store(), kv.Streaming(budget=10), store()))
