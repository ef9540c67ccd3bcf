"""Two selectors that need all that a selector can be given, against a mask built entry by entry.

Neither is a method: `AnchorLike` hands over its own base, `LocalHeads` has a window for each head from a record.
"""
from dataclasses import replace
from itertools import product

import pytest
import torch
from llmopt_kernels import NONE, Partial, Ragged, Stripes
from pydantic.dataclasses import dataclass
from torch.testing import assert_close

from llmopt import runtime
from llmopt.attention.base import Selector, State
from llmopt.method import Record
from llmopt.runtime.prompt import Prompt
from tests.attention.test_sequences import turns
from tests.kernels.test_reference import RULES, draw, one_query
from tests.kernels.test_sparse import visible_by_hand
from tests.tiny import ids, make

TILE, GROUP, THETA = 4, 2, 0.5


@dataclass(frozen=True)
class AnchorLike(Selector):
    """Base: from one tile before the group of tiles to the row. Stripes: earlier keys close to the base's maxima."""

    name = "test.anchor"
    hands_over: bool = True

    def select(self, q, k, state):
        tiles = -(-q.shape[1] // TILE)
        group = state.offset + torch.arange(tiles) // GROUP * GROUP * TILE               # first row of the group
        start = (group - TILE).clamp(min=0)
        logits = state.rule.logits(q.unflatten(0, (len(k), -1)), k.unsqueeze(1)).flatten(0, 1)            # [H, T, S]
        i, j = torch.arange(state.offset, k.shape[1]), torch.arange(k.shape[1])
        first = start.repeat_interleave(TILE)[:len(i)]
        base = state.rule.visible(i, j) & (j >= first[:, None])
        top = logits.masked_fill(~base, -torch.inf).amax(-1, keepdim=True)               # the row maxima
        weights = (logits - top).exp() * base
        sums = weights.sum(-1, keepdim=True)
        out = weights / sums @ state.values.repeat_interleave(len(q) // len(k), 0)
        close = (logits > top - THETA) & (j < first[:, None])                            # [H, T, S]
        return Stripes(0, start=start, columns=self._columns(close, tiles), tile=TILE,
                       done=Partial(out, (top + sums.log()).squeeze(-1)) if self.hands_over else None)

    @staticmethod
    def _columns(close, tiles):
        """[H, tiles, S]: keys that some row of the tile's group is close to."""
        rows = torch.nn.functional.pad(close, (0, 0, 0, -close.shape[1] % (TILE * GROUP)))
        any_row = rows.unflatten(1, (-1, TILE * GROUP)).any(2).repeat_interleave(GROUP, 1)[:, :tiles]
        return torch.where(any_row, torch.arange(close.shape[-1]), NONE)


@dataclass(frozen=True)
class LocalHeads(Selector):
    """A window for each head of each layer, made by `plan`; the tensor is made once and shared by all layers."""

    name = "test.local_heads"

    def plan(self, model, run):
        return Record({"windows": [[3, 9, 40, 5], [1, 2, 3, 60], [7, 7, 30, 2]]})

    def select(self, q, k, state):
        table = state.shared.setdefault("windows", torch.tensor(state.record.meta["windows"]))
        return Stripes(2, table[state.layer], tile=TILE)


@pytest.fixture(scope="module")
def model():
    return make("llama")


OLD, NEW = 20, 12           # columns before this forward, and in it
ROWS = [                    # (real tokens before, real new ones, places that each KV head still holds)
    (20, 12, [range(20), range(20)]),                                   # nothing is lost
    (17, 9, [[0, 1, 5, 13, 14, 15, 16], [2, 3, 14, 15, 16]]),           # the run begins at 15, behind a merged entry
    (14, 12, [[3], []]),                                                # a head has lost all
]
BIAS = {(1, 0, 14): 0.7}    # of a kept entry that stands for others: (row, KV head, place)


def noise(row):
    """What a row's tokens are, by place: queries of the new ones [4, T, 8], keys and values [2, n, 8]."""
    old, new, _ = ROWS[row]
    return draw(4, new, 8, seed=row), draw(2, old + new, 8, seed=row + 9), draw(2, old + new, 8, seed=row + 18)


def batch(rule, layer):
    """The rows as a padded batch, old entries flat."""
    query, (keys, values) = torch.zeros(len(ROWS), 4, NEW, 8), torch.zeros(2, len(ROWS), 2, NEW, 8)
    mask, flat = torch.zeros(len(ROWS), OLD + NEW, dtype=torch.bool), ([], [], [], [])
    for row, (old, new, heads) in enumerate(ROWS):
        q, k, v = noise(row)
        mask[row, OLD - old:OLD] = mask[row, OLD + NEW - new:] = True
        query[row, :, NEW - new:], keys[row, :, NEW - new:], values[row, :, NEW - new:] = q, k[:, old:], v[:, old:]
        for head, places in enumerate(heads):
            at = torch.tensor(list(places), dtype=torch.long)
            bias = torch.tensor([BIAS.get((row, head, j), 0.0) for j in places])
            for part, x in zip(flat, (k[head, at], v[head, at], at + OLD - old, bias), strict=True):
                part.append(x)
    counts = torch.tensor([[len(places) for places in heads] for _, _, heads in ROWS])
    kept = Ragged(torch.cat(flat[0]), torch.cat(flat[1]), torch.cat(flat[2]).int(), counts,
                  {"bias": torch.cat(flat[3])})
    return Prompt(query, keys, values, kept, mask, OLD + NEW, rule, layer), mask[:, OLD:]


def by_hand(method, record, rule, layer, row):
    """[4, T, 8] of one row and the pairs [4], computed and dense: its run by the method's lists, all older entries."""
    old, new, heads = ROWS[row]
    q, k, v = noise(row)
    whole = [{j for j in places if (row, head, j) not in BIAS} for head, places in enumerate(heads)]
    begin = next(s for s in range(old + 1) if all(set(range(s, old)) <= places for places in whole))
    begin = max(begin, old - (rule.window or 99) + 1)
    state = State(layer, rule, v[:, begin:], old - begin, begin, record)
    stripes = method.select(q, k[:, begin:], state)
    stripes = replace(stripes, sinks=max(0, stripes.sinks - begin), done=None)
    _, run = visible_by_hand(stripes, rule, 4, new, old + new - begin)
    out, pairs, dense = torch.zeros(4, new, 8), [0] * 4, [0] * 4
    for h, t in product(range(4), range(new)):
        reach = old + t - (rule.window or 99)
        seen = [j for j in heads[h // 2] if reach < j < begin]
        dense[h] += len(seen) + old + t + 1 - max(begin, reach + 1)
        seen += [begin + j for j in run[h, t].nonzero().flatten().tolist()]
        bias = torch.tensor([BIAS.get((row, h // 2, j), 0.0) for j in seen])
        out[h, t] = one_query(q[h, t], k[h // 2, seen], v[h // 2, seen], rule, bias)
        pairs[h] += len(seen)
    return out, torch.tensor([pairs, dense])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", [AnchorLike(min_length=0), AnchorLike(min_length=0, hands_over=False),
                                    LocalHeads(min_length=0)])
def test_what_is_selected_is_computed(model, method, rule):
    prompt, real = batch(rule, layer=1)
    with runtime.attached(model, method):
        live = runtime.attachment(model)
        got, counter, record = method.attention(prompt, live), live.stats[1], live.record(method.place)
    pairs = torch.zeros(2, 4, dtype=torch.long)
    for row in range(len(ROWS)):
        want, count = by_hand(method, record, rule, 1, row)
        assert_close(got[row][:, real[row]], want, atol=1e-5, rtol=1e-5)
        pairs += count
    assert bool((got.mT[~real[:, None, None].expand_as(got.mT)] == 0).all())
    assert [counter.computed.tolist(), counter.dense.tolist()] == pairs.tolist()


def test_a_method_gets_its_record_and_a_dict_from_layer_to_layer(model):
    tokens, seen = ids(2, 30), []

    @dataclass(frozen=True)
    class Looks(LocalHeads):
        def select(self, q, k, state):
            seen.append((state.layer, state.shared.setdefault("first layer", state.layer), id(state.shared)))
            return super().select(q, k, state)

    with runtime.attached(model, Looks(min_length=0)):
        model(tokens)
        assert [layer for layer, first, _ in seen if first == 0] == [0, 0, 1, 1, 2, 2]
        assert len({dictionary for *_, dictionary in seen}) == 2                   # one for each row
        assert runtime.attachment(model).now.shared == {}
        alone = model(tokens[:1]).logits
        assert_close(model(tokens).logits[:1], alone, atol=1e-5, rtol=1e-5)
        counter = runtime.attachment(model).stats[1]
    windows = [1, 2, 3, 60]
    assert counter.computed.tolist() == [5 * sum(min(i + 1, w + min(2, max(0, i + 1 - w))) for i in range(30))
                                         for w in windows]


def test_what_a_method_sees_depends_on_no_neighbour():
    """A sliding layer holds more of a short row than of one that stands beside a long row."""
    model, seen = make("mistral", sliding_window=12), []

    @dataclass(frozen=True)
    class Looks(LocalHeads):
        def select(self, q, k, state):
            seen.append((q.shape[1], k.shape[1], state.offset, state.dropped))
            return super().select(q, k, state)

    with runtime.attached(model, Looks(min_length=0)):
        turns(model, [[ids(1, 20)[0], ids(1, 5)[0]]])
        alone = seen[::3]
        seen.clear()
        turns(model, [[ids(1, 40)[0], ids(1, 5)[0]], [ids(1, 20)[0], ids(1, 5)[0]]])
    assert alone == seen[1::6] == [(20, 20, 0, 0), (5, 16, 11, 9)]
