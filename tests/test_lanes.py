"""Lanes, the buffers of a cache layer that grow in place, against lists of what was written to them."""
import pytest
import torch
from llmopt_kernels import Ragged, Rule
from llmopt_kernels.reference import ragged_attention
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.runtime.lanes import LEAST, Lanes, lanes_attention
from tests.tiny import ids, make

COUNTS = [[[3, 3], [3, 3]], [[5, 0], [2, 9]], [[0, 0], [0, 0]]]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain:
    """The entries as two tensors a head, copied at every step."""

    def __init__(self, counts, kept, tail):
        self.counts, self.kept, self.tail = counts, kept, tail

    def append(self, keys, values):
        tail = tuple(torch.cat([old, new], 2) for old, new in zip(self.tail, (keys, values), strict=True))
        return Plain(self.counts, self.kept, tail)

    def fork(self, length=None):
        return Plain(self.counts, self.kept, tuple(x[:, :, :length] for x in self.tail))

    def taken(self, rows, size):
        flat = Ragged(*self.kept, torch.zeros(len(self.kept[0]), dtype=torch.int), self.counts).select_rows(rows)
        return Plain(flat.counts, (flat.keys, flat.values), tuple(x[rows] for x in self.tail))


def agree(lanes, plain):
    for mine, theirs in zip((*lanes.kept, *lanes.tail), (*plain.kept, *plain.tail), strict=True):
        assert torch.equal(mine, theirs)
    (batch, groups), tokens = lanes.counts.shape, lanes.length
    query, visible = noise(batch, 2 * groups, 1, 8), noise(batch, tokens, seed=1) > -0.5
    flat = Ragged(*plain.kept, torch.zeros(len(plain.kept[0]), dtype=torch.int), plain.counts)
    for mask in (None, visible):
        wide = None if mask is None else mask[:, None]
        want = ragged_attention(query, flat, plain.tail, wide, 100, Rule(0.3))
        assert_close(lanes_attention(query, lanes, mask, 0.3), want, atol=1e-5, rtol=1e-5)


def begun(counts, tokens=2):
    """Lanes and lists of the same entries and tokens."""
    counts, total = torch.tensor(counts), int(torch.tensor(counts).sum())
    kept, tail = (noise(total, 8), noise(total, 8, seed=1)), (noise(2, 2, tokens, 8), noise(2, 2, tokens, 8, seed=1))
    first = Lanes.empty(torch.zeros_like(counts), 0, kept).append(*tail)
    return first.behind(counts, kept), Plain(counts, kept, tail)


@pytest.mark.parametrize("counts", COUNTS)
@torch.no_grad()
def test_every_use_equals_lists_that_are_copied(counts):
    lanes, plain = begun(counts)
    left = []                                       # forks and what they came from, looked at once more at the end
    for step, tokens in enumerate([1, 1, 4, 1, 13, 1, 1, 70, 1]):
        batch = len(lanes.counts)
        if step % 3 == 1:
            left.append((lanes.fork(lanes.length - 1), plain.fork(lanes.length - 1)))
        if step == 4:
            rows = torch.tensor([1, 0, 1])
            lanes, plain = lanes.taken(rows, lanes.size), plain.taken(rows, None)
            batch = 3
        if step == 6:
            left.append((lanes, plain))
            lanes, plain = lanes.fork(), plain.fork()
        new = noise(batch, 2, tokens, 8, seed=step), noise(batch, 2, tokens, 8, seed=step + 50)
        lanes, plain = lanes.append(*new), plain.append(*new)
        agree(lanes, plain)
    for pair in left:
        agree(*pair)
        more = [x[:len(pair[0].counts)] for x in new]
        assert torch.equal(pair[0].fork().append(*more).tail[1], pair[1].append(*more).tail[1])
        agree(*pair)
    assert torch.equal(lanes.last(5).tail[0], plain.tail[0][:, :, -5:])


@pytest.mark.parametrize("counts", COUNTS)
@torch.no_grad()
def test_a_token_is_written_in_place_until_the_room_is_full(counts):
    lanes, _ = begun(counts)
    lanes = lanes.append(noise(2, 2, 1, 8), noise(2, 2, 1, 8))
    room, buffer = lanes.size - lanes.length, lanes.buffers[0]
    for _ in range(room):
        assert lanes.append(noise(2, 2, 1, 8), noise(2, 2, 1, 8)) is lanes and lanes.buffers[0] is buffer
    more = lanes.append(noise(2, 2, 1, 8), noise(2, 2, 1, 8))
    assert room > 0 and more is not lanes and more.size - lanes.length >= LEAST


@pytest.mark.parametrize("counts", COUNTS)
@torch.no_grad()
def test_a_fork_and_what_it_came_from_do_not_write_over_each_other(counts):
    lanes = begun(counts)[0].append(noise(2, 2, 1, 8), noise(2, 2, 1, 8))
    before, twin, shorter = lanes.length, lanes.fork(), lanes.fork(lanes.length - 1)
    assert lanes.size > before and twin.buffers[0].data_ptr() == lanes.buffers[0].data_ptr()
    grown = [one.append(noise(2, 2, 1, 8, seed=seed), noise(2, 2, 1, 8)) for seed, one in
             ((1, lanes), (2, twin), (3, shorter))]
    for seed, one in zip((1, 2, 3), grown, strict=True):
        assert torch.equal(one.tail[0][:, :, -1:], noise(2, 2, 1, 8, seed=seed))
    assert torch.equal(lanes.tail[0][:, :, before - 1:before], noise(2, 2, 1, 8))


def test_what_a_gradient_reads_is_not_written_to():
    with torch.no_grad():
        lanes = begun(COUNTS[2])[0].append(noise(2, 2, 1, 8), noise(2, 2, 1, 8))
    new = [noise(2, 2, 1, 8, seed=seed).requires_grad_() for seed in (1, 2)]
    for grown in (lanes, lanes.fork().append(*(x.detach() for x in new))):
        grown = grown.append(*new)
        out = lanes_attention(noise(2, 4, 1, 8).requires_grad_(), grown, None, 0.3)
        with torch.no_grad():
            grown.append(*(torch.zeros_like(x) for x in new))
        for x in torch.autograd.grad(out.sum(), new):
            assert float(x.abs().max()) > 0


def test_lanes_leave_inference_mode_and_widen():
    with torch.inference_mode():
        lanes = begun(COUNTS[1])[0].append(noise(2, 2, 1, 8), noise(2, 2, 1, 8))
    with torch.no_grad():
        grown = lanes.append(noise(2, 2, 1, 8, seed=3), noise(2, 2, 1, 8))
        assert torch.equal(grown.tail[0][:, :, -1:], noise(2, 2, 1, 8, seed=3))
        wide = grown.append(noise(2, 2, 1, 8).double(), noise(2, 2, 1, 8).double())
    assert wide.buffers[0].dtype == torch.float64 and grown.buffers[0].dtype == torch.float32


@pytest.mark.parametrize("allocate", ["uniform", "ada"])
@torch.no_grad()
def test_decoding_copies_nothing_and_a_beam_goes_its_own_way(allocate):
    """A cache that decodes keeps its buffers; copies of it, rows that change places and turns behind go on alike."""
    model, tokens = make("llama"), ids(2, 60)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with runtime.attached(model, kv.SnapKV(budget=30, window=4, allocate=allocate)):
        cache = model(tokens[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
        places, want = [], None
        for i in range(40, 44):
            cache = model(tokens[:, i:i + 1], attention_mask=mask[:, :i + 1], past_key_values=cache).past_key_values
            places.append(cache.layers[0].lanes.buffers[0].data_ptr())
        twin = cache.fork()
        twin.reorder_cache(torch.tensor([1, 0]))
        for one, rows in ((cache, [0, 1]), (twin, [1, 0])):
            got = [model(tokens[rows, i:i + 1], attention_mask=mask[rows, :i + 1], past_key_values=one).logits[rows]
                   for i in range(44, 47)]
            got.append(model(tokens[rows, 47:], attention_mask=mask[rows], past_key_values=one).logits[rows])
            want = want or got
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    assert len(set(places[:3])) == 1
