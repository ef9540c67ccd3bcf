"""ACT: its formula entry by entry, its guard, and that a text is adjusted alike however it is read."""
import dataclasses

import pytest
import torch
from llmopt_kernels import NONE, Rule
from torch.testing import assert_close

from llmopt import LlmoptError, attention, kv, runtime
from llmopt.attention import act
from llmopt.attention.act import Act, Text, calibrated
from llmopt.calibration.losses import row_losses
from llmopt.method import Record, Run
from llmopt.recipe.reader import check_order
from llmopt.runtime.cache_layer import Entries, RaggedLayer
from llmopt.runtime.prompt import Attended
from llmopt.scale.memory import Memory
from tests.attention.test_sequences import turns
from tests.tiny import CONFIGS, ids, make

CONTRACT = {"edges": 0, "share": 1.0, "filter": False, "threshold": 0.03, "times": 0.0, "queries": 2, "rows": 2}
LOOSE = Act(**CONTRACT)                                     # finds sinks in random models, which have none
ALL = {"heads": [[0, 1, 2, 3]] * 3}


def build(family):
    changes = {"mistral": {"sliding_window": 12}, "gemma2": {"attn_logit_softcapping": 5.0}}
    return make(family, **changes.get(family, {}))


def by_hand(method, query, keys, values, rule, places, bias=None):      # [T, D], [n, D], [n, D], n places -> [T, D]
    """One head entry by entry; the queries are the newest tokens, and older ones have drawn nothing."""
    query, keys, values = query.double(), keys.double(), values.double()        # 1 - mass is small
    total, first = places[-1] + 1, places[-1] + 1 - len(query)
    drawn, out = dict.fromkeys(places, 0.0), []
    for t, q in enumerate(query):
        i = first + t
        seen = [x for x, j in enumerate(places) if j <= i and i - j < (rule.window or total)]
        logits = rule.scaling * (keys[seen] @ q)
        logits = rule.softcap * torch.tanh(logits / rule.softcap) if rule.softcap else logits
        weights = (logits + bias[seen] if bias is not None else logits).softmax(0)
        for x, w in zip(seen, weights.tolist(), strict=True):
            drawn[places[x]] += w
        sinks = torch.tensor([is_sink(method, places[x], i, drawn[places[x]], rule) for x in seen])
        mass = weights[sinks].sum()
        new = torch.where(sinks, method.beta * weights, weights * (1 + (1 - method.beta) * mass / (1 - mass)))
        assert_close(new.sum(), torch.tensor(1.0).double())
        out.append(new @ values[seen])
    return torch.stack(out).float()


def is_sink(method, k, t, drawn, rule):
    seen = t - k + 1
    even = sum(1 / min(u + 1, rule.window or u + 1) for u in range(k, t + 1))
    return k > 0 and seen >= method.queries and drawn > method.threshold * seen and drawn > method.times * even


RULES = [Rule(0.35), Rule(0.35, window=9), Rule(0.5, softcap=3.0)]
FIELDS = [{}, {"times": 1.5}, {"beta": 0.0, "queries": 6}, {"threshold": 0.08}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_the_formula(rule, fields, monkeypatch):
    """Grouped heads, some of them chosen, no cache, tiles of a few queries."""
    monkeypatch.setattr(act, "ENTRIES", 200)
    torch.manual_seed(0)
    method, model = dataclasses.replace(LOOSE, **fields), make("llama")
    query, keys, values = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    out = torch.randn(2, 4, 40, 8)
    with runtime.attached(model):
        runtime.attach(model, method, Record({"heads": [[], [0, 2, 3], []]}))
        live = runtime.attachment(model)
        at = Attended(query, keys, values, None, None, 40, rule, 1)
        got = method.adjust(out, at, live)
        assert live.stats[1].queries == 80 and bool((live.stats[1].mass[[0, 2, 3]] > 0).all())
        assert torch.equal(method.adjust(out, dataclasses.replace(at, layer=0), live), out)
    assert torch.equal(got[:, 1], out[:, 1])
    for row in range(2):
        for head in (0, 2, 3):
            want = by_hand(method, query[row, head], keys[row, head // 2], values[row, head // 2], rule, range(40))
            found = got[row, head]
            same = (found == out[row, head]).all(-1)                # rows without a sink keep what they had, bit by bit
            assert 0 < int(same.sum()) < 40
            assert_close(found[~same], want[~same], atol=1e-5, rtol=1e-5)
            plain = by_hand(dataclasses.replace(method, beta=1.0), query[row, head], keys[row, head // 2],
                            values[row, head // 2], rule, range(40))
            assert_close(plain[same], want[same], atol=1e-5, rtol=1e-5)


def test_kept_entries_are_adjusted_as_what_is_there():
    """Uneven heads, a merged entry, a tail."""
    torch.manual_seed(1)
    layer, rule, places = RaggedLayer(2), Rule(0.35), [[0, 3, 4, 9], [2, 9]]
    layer.update(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8))
    keys, values = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    positions = torch.tensor([places[0], [*places[1], NONE, NONE]])
    bias = torch.tensor([[0.0, 0.7, 0.0, 0.0], [0.0] * 4])
    layer.fold([Entries(keys, values, positions, {"bias": bias})])
    new = torch.randn(2, 1, 2, 12, 8)
    layer.update(*new)
    query, model = torch.randn(1, 4, 12, 8), make("llama")
    with runtime.attached(model):
        runtime.attach(model, LOOSE, Record(ALL))
        live = runtime.attachment(model)
        at = Attended(query, *new, layer, None, 22, rule, 0)
        got = LOOSE.adjust(torch.zeros(1, 4, 12, 8), at, live)
    for head in range(4):
        group, kept = head // 2, places[head // 2]
        own = [torch.cat([held[group, :len(kept)], x[0, group]]) for held, x in zip((keys, values), new, strict=True)]
        weight = torch.cat([bias[group, :len(kept)], torch.zeros(12)])
        want = by_hand(LOOSE, query[0, head], *own, rule, [*kept, *range(10, 22)], weight)
        changed = (got[0, head] != 0).any(-1)
        assert int(changed.sum()) > 5
        assert_close(got[0, head][changed], want[changed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rows_add_up_to_one_and_freed_mass_goes_out_in_proportion(beta):
    torch.manual_seed(0)
    weights, sinks = torch.randn(2, 5, 7).softmax(-1), torch.rand(2, 5, 7) < 0.4
    sinks[..., 0] = False
    new, mass = calibrated(weights, sinks, torch.eye(7), beta)
    assert_close(new.sum(-1), torch.ones(2, 5))
    assert_close(mass, (weights * sinks).sum(-1))
    assert_close(new[sinks], beta * weights[sinks])
    shares = [x.masked_fill(sinks, 0) / x.masked_fill(sinks, 0).sum(-1, keepdim=True) for x in (new, weights)]
    assert_close(*shares)


def test_all_but_the_first_token_turned_down():
    """A'[t, 0] = A[t, 0] + (1 - beta) (1 - A[t, 0]): what all others lose."""
    weights, sinks = torch.randn(1, 4, 6).softmax(-1), torch.ones(1, 4, 6, dtype=torch.bool)
    sinks[..., 0] = False
    new, _ = calibrated(weights, sinks, torch.eye(6), 0.25)
    assert_close(new[..., 0], weights[..., 0] + 0.75 * (1 - weights[..., 0]))
    none, _ = calibrated(weights, torch.ones_like(sinks), torch.eye(6), 0.25)
    assert_close(none, weights)                             # nothing is left that could take it


def test_without_beta_sinks_are_masked_out():
    logits, values = torch.randn(3, 5, 9), torch.randn(9, 4)
    sinks = torch.rand(3, 5, 9) < 0.3
    sinks[..., 0] = False
    new, _ = calibrated(logits.softmax(-1), sinks, values, 0.0)
    assert_close(new, logits.masked_fill(sinks, -torch.inf).softmax(-1) @ values)


# --------------------------------------------------------------------------------------------------------- the guard


def found_in(maps, **fields):
    """Sinks of the last token by the method's rule, of one map [N, N] after the other."""
    total = len(maps)
    at = Attended(torch.zeros(1, 1, total, 1), None, None, None, None, total, Rule(1.0), 0)
    text, places = Text.of(at, 0), torch.arange(total)
    marked = Act(**{"threshold": 0.1, **fields}).sinks(maps.cumsum(0)[None], text, places, places)
    return marked[0, -1].nonzero().flatten().tolist()


def test_even_attention_has_no_sinks():
    """a_k = (H_N - H_k) / (N - k): 5 / N would flag tokens 0 and 1 of 288, where there is nothing to find."""
    even = torch.ones(288, 288).tril() / torch.arange(1, 289)[:, None]
    assert found_in(even, threshold=5 / 288, times=0, queries=1) == [1]             # never the first, by position
    assert found_in(even, threshold=5 / 288) == []


def test_a_planted_sink_is_found_and_only_it():
    """Half of the attention on token 7, the rest on the token itself and the one before."""
    maps = torch.eye(100) * 0.3 + torch.diag(torch.full((99,), 0.2), -1)
    maps[7:, 7] = 0.5
    assert found_in(maps) == [7]
    assert {98, 99} <= set(found_in(maps, times=0, queries=1))          # the newest tokens, without the guard
    maps[:, 0] = 0.5
    assert found_in(maps) == [7]                                        # by position the first token is none


# -------------------------------------------------------------------------------------------------- as a text is read


def calibrating(model, *more, method=LOOSE, heads=ALL):
    """Inside, the method is in force with these heads."""
    class Given(Act):
        def plan(self, model, run):
            return Record(heads)
    return runtime.attached(model, Given(**dataclasses.asdict(method)), *more)


@pytest.mark.parametrize("family", [*CONFIGS])
@torch.no_grad()
def test_however_a_text_is_read_it_is_adjusted_alike(family):
    model, tokens = build(family), ids(2, 50)
    dense = model(tokens).logits
    with calibrating(model):
        whole, cache, parts = model(tokens, use_cache=False).logits, None, []
        for start, stop in ((0, 20), (20, 45), *((i, i + 1) for i in range(45, 50))):
            out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(whole, dense, atol=1e-2)
    assert_close(whole[:, :20], parts[0], atol=2e-5, rtol=1e-4)         # nothing looks ahead
    with calibrating(model, method=dataclasses.replace(LOOSE, beta=1.0)):
        assert_close(model(tokens).logits, dense, atol=1e-5, rtol=1e-5)
    with calibrating(model, method=dataclasses.replace(LOOSE, threshold=1.0)):
        none = model(tokens).logits
    with calibrating(model, heads={"heads": [[], [], []]}):
        assert torch.equal(none, model(tokens).logits)


@pytest.mark.parametrize("evictor", [None, kv.Streaming(budget=20, sinks=2), kv.SnapKV(ratio=0.4, window=4),
                                     kv.SnapKV(budget=16, window=4, allocate="global"),
                                     kv.KVzip(ratio=0.5, window=4), kv.Quant(bits=4, residual=4, group_size=8)])
@torch.no_grad()
def test_a_row_is_what_it_is_alone_in_every_turn(evictor):
    lengths = [(30, 30, 8, 1, 1), (12, 30, 20, 1, 1), (3, 1, 40, 1, 1)]
    rows = [[ids(1, n, seed=7 * r + t)[0] for t, n in enumerate(row)] for r, row in enumerate(lengths)]
    model = make("llama")
    with calibrating(model, *filter(None, [evictor])):
        together = turns(model, rows)
        for got, row in zip(together, rows, strict=True):
            assert_close(got, turns(model, [row])[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_beams_and_a_token_read_again():
    model, tokens = make("llama"), ids(2, 40)
    with calibrating(model, kv.Streaming(budget=1000)):
        cache = model(tokens[:, :30], use_cache=True).past_key_values
        fork, third = cache.fork(), cache.fork()
        first = model(tokens[:, 30:31], past_key_values=cache).logits
        assert torch.equal(model(tokens[:, 30:31], past_key_values=fork).logits, first)
        with runtime.frozen(model):
            assert torch.equal(model(tokens[:, 30:31], past_key_values=third).logits, first)
        again = model(tokens[:, 30:31], past_key_values=fork.without_last()).logits
        assert_close(again, first, atol=1e-5, rtol=1e-5)
        cache.reorder_cache(torch.tensor([1, 1]))
        swapped = model(tokens[[1, 1], 31:32], past_key_values=cache).logits
        assert_close(swapped[0], model(tokens[:, 31:32], past_key_values=fork).logits[1], atol=1e-5, rtol=1e-5)
        shapes = {tuple(layer.drawn.shape) for layer in cache.layers}
        assert shapes == {(2, 2, 4, 32)}                    # twice [rows, heads, tokens], and in what the cache takes
        assert all(any(t is layer.drawn for t in layer.tensors()) for layer in cache.layers)


def test_packed_sequences_and_sparse_prefill_are_refused_by_name():
    model, tokens = make("llama"), ids(1, 30)
    with calibrating(model), pytest.raises(LlmoptError, match="4-D attention masks.*attention.act.*2-D attention_mask"):
        model(tokens, attention_mask=torch.ones(1, 1, 30, 30, dtype=torch.bool).tril(), use_cache=False)
    with pytest.raises(LlmoptError, match="one attention method .*attention.a_shape and attention.act"):
        check_order((attention.AShape(), Act()))
    with calibrating(model), pytest.raises(LlmoptError, match="act is attached already; at most one attention"):
        runtime.attach(model, attention.AShape())


# ---------------------------------------------------------------------------------------------------- which heads


def data(rows=6, length=40):
    return Run([{"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}])


@torch.no_grad()
def test_heads_are_kept_whose_calibration_makes_the_data_more_likely():
    model, run = make("llama"), data()
    method = dataclasses.replace(LOOSE, filter=True, share=0.5, sure=0.5, rows=5)

    def losses(heads):
        meta = {"heads": [sorted(head for layer, head in heads if layer == index) for index in range(3)]}
        with calibrating(model, method=method, heads=meta):
            hidden = model.get_decoder()(run.batches[0]["input_ids"][:5], use_cache=False)[0]
            return row_losses(model, hidden, *(run.batches[0][key][:5] for key in ("input_ids", "attention_mask")))

    with calibrating(model):
        model(run.batches[0]["input_ids"][:5], use_cache=False)
        mass = torch.stack([runtime.attachment(model).stats[layer].mass for layer in range(3)]).flatten()
    record, kept, best = method.plan(model, run), [], losses([])
    assert runtime.attachment(model) is None
    for number in mass.argsort(descending=True)[:6].tolist():
        place = divmod(number, 4)
        gain = best - (now := losses([*kept, place]))
        if gain.mean() > 0.5 * gain.std() / 5 ** 0.5:
            kept, best = [*kept, place], now
    assert 0 < len(kept) < 6
    assert record.meta["heads"] == [sorted(head for layer, head in kept if layer == index) for index in range(3)]
    assert record.meta["tried"] == 6 and record.meta["loss"][1] < record.meta["loss"][0]
    assert_close(record.meta["loss"], [float(losses([]).mean()), float(best.mean())], atol=1e-4, rtol=1e-4)


class Journal(Memory):
    """Remembers, and dies at its fifth entry."""

    def __init__(self):
        self.known = {}

    def remember(self, name, compute):
        if name not in self.known:
            self.known[name] = compute()
            if len(self.known) == 5:
                raise KeyboardInterrupt
        return self.known[name]


def test_a_run_that_was_cut_off_goes_on_with_the_next_head():
    model, method, run = make("llama"), dataclasses.replace(LOOSE, filter=True, sure=0.5), data()
    wanted, run.memory, read = method.plan(model, run).meta, Journal(), []
    model.get_decoder().register_forward_hook(lambda *args: read.append(args[1]))
    with pytest.raises(KeyboardInterrupt):
        method.plan(model, run)
    before = len(read)
    assert method.plan(model, run).meta == wanted
    again = len(read) - before                              # two rows: for the ranking, and for each head; twice a row,
    assert again == 2 + (1 + 12 - 5) * 2 * 2                # since logits pass through the decoder's place


def test_heads_by_scores_of_another_step_without_any_data():
    model = make("llama")
    scores = {"heads.span": [torch.tensor(row) for row in ([9.0, 9, 9, 9], [1.0, 4, 2, 3], [9.0, 9, 9, 9])]}
    method = Act(heads="heads.span", share=0.2, edges=1, filter=False)
    assert not method.needs_data and Act().needs_data
    assert method.plan(model, Run(scores=scores)).meta == {"heads": [[], [1, 2, 3], []], "tried": 3}


def test_no_head_that_helps_is_said(caplog):
    model = make("llama")
    meta = dataclasses.replace(LOOSE, filter=True, sure=1e9).plan(model, data()).meta
    assert meta["heads"] == [[], [], []] and meta["loss"][0] == meta["loss"][1]
    assert "none of the 12 heads tried" in caplog.text


@pytest.mark.parametrize(("method", "run", "fact"), [
    (Act(), Run(), "tried on calibration data, and there is none"),
    (Act(edges=2), data(), "edges: 2 layers at each end are left out, and the model has 3"),
    (Act(), data(rows=1), "at least 2 are needed")])
def test_what_cannot_be_tried_is_refused(method, run, fact):
    with pytest.raises(LlmoptError, match=fact):
        method.plan(make("llama"), run)


@pytest.mark.parametrize("heads", [[[0]], [[4], [], []], [[1, 0], [], []], [[0, 0], [], []], [[-1], [], []],
                                   [["0"], [], []]])
def test_a_forged_record_is_refused(heads):
    with pytest.raises(LlmoptError, match="attention.act"):
        LOOSE.restore(make("llama"), Record({"heads": heads}))
