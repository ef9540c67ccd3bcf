"""Tokens that are written one by one and read by blocks: `attention.reuse` with `phase: decode`."""
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from llmopt_kernels import Rule
from torch.testing import assert_close

import llmopt
from llmopt import kv, runtime
from llmopt.attention import Reuse
from llmopt.attention.by_token import Held, taken
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.runtime.pools import Pools
from tests.kernels.test_reference import draw, one_query
from tests.tiny import ids, make

FIELDS = dict(phase="decode", block=4, keep=2, min_length=0)


@contextmanager
def decoding(family="llama", sources=(0, 1, 2), **fields):
    """A model whose single tokens read by blocks, with this record."""
    model = make(family)
    method = Reuse(**FIELDS | fields)
    method.restore(model, Record({"sources": list(sources)}))
    yield model
    runtime.detach(model)


def written(model, tokens, prompt, cache=None, mask=None):
    """Logits [B, T, V] of tokens [B, T], of which the first `prompt` are read at once."""
    found = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        given = None if mask is None else mask[:, :end]
        places = None if mask is None else (given.cumsum(1) - 1).clamp(min=0)[:, start:]
        out = model(tokens[:, start:end], past_key_values=cache, attention_mask=given, position_ids=places)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def density(model, layer=0):
    return float(runtime.attachment(model).stats[layer].density[0])


@pytest.mark.parametrize("rule", [Rule(0.5), Rule(0.3, softcap=2.0),
                                  Rule(0.5, sinks=torch.tensor([1.0, -1.0, 3.0, 0.0]))])
def test_what_a_token_reads_by_hand(rule):
    """Blocks of 4 of 23 keys: 0 is read in any case, of 1 to 4 two are, 20 to 22 are the newest."""
    query, keys, values = draw(4, 8), draw(2, 23, 8, seed=1), draw(2, 23, 8, seed=2)
    held = Held(query, keys, values, keys[:, :20].unflatten(1, (5, 4)).mean(2), rule, 4, 1, 1)
    assert (held.choice, held.end) == (4, 5)
    chosen = held.chosen(2)
    for group in range(2):
        means = keys[group, :20].unflatten(0, (5, 4)).mean(1)
        weights = rule.logits(query[None, 2 * group:2 * group + 2], means[None])[0].softmax(-1).mean(0)
        best = sorted(range(1, 5), key=lambda block: -float(weights[block]))[:2]
        places = [*range(4), *(4 * block + i for block in sorted(best) for i in range(4)), 20, 21, 22]
        assert chosen[group].tolist() == places
        for head in (2 * group, 2 * group + 1):
            want = one_query(query[head], keys[group, places], values[group, places], replace(rule), head=head)
            assert_close(held.read(chosen)[head, 0], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("x", [draw(3, 10, 8), draw(10, 3, 8).transpose(0, 1), draw(3, 20, 8)[:, 5:15],
                               draw(3, 8, 10).transpose(1, 2), draw(3, 10, 12)[..., 2:10]])
def test_rows_of_memory_are_taken_in_any_layout(x):
    places = torch.tensor([[0, 9, 4], [1, 1, 2], [9, 8, 0]])
    assert torch.equal(taken(x, places), torch.stack([one[place] for one, place in zip(x, places, strict=True)]))


def test_means_grow_block_by_block():
    keys, pools = draw(2, 30, 8), Pools.empty(4, 3, draw(2, 0, 8))
    for length in (5, 8, 9, 20, 30):
        pools = pools.grown(keys[:, :length])
        assert pools.means.shape[1] == (length - 3) // 4
    assert_close(pools.means, keys[:, 3:27].unflatten(1, (6, 4)).mean(2))


def test_where_everything_is_kept_nothing_changes():
    tokens = ids(2, 40)
    with decoding(keep=9) as model:
        assert_close(written(model, tokens, 20), make("llama")(tokens).logits, atol=1e-5, rtol=1e-5)
        assert density(model) == 1
    with decoding(sources=(-1, -1, -1)) as model:
        assert_close(written(model, tokens, 20), make("llama")(tokens).logits, atol=1e-5, rtol=1e-5)


def test_prompts_and_short_texts_read_everything():
    tokens = ids(1, 40)
    dense = make("llama")(tokens).logits
    with decoding() as model:
        assert_close(model(tokens).logits, dense, atol=1e-5, rtol=1e-5)
        assert not runtime.attachment(model).stats
        assert not torch.allclose(written(model, tokens, 20)[:, 20:], dense[:, 20:], atol=1e-3)
        read = [4 + min(2, max(0, (n - 1) // 4 - 1)) * 4 + (n - 1) % 4 + 1 for n in range(21, 41)]
        assert density(model) == pytest.approx(sum(read) / sum(range(21, 41)))
    with decoding(min_length=41) as model:
        assert_close(written(model, tokens, 20), dense, atol=1e-5, rtol=1e-5)


def test_last_belongs_to_prompts():
    with pytest.raises(LlmoptError, match="last: 3 given, 0, as prompts are read in full where phase"):
        Reuse(phase="decode", last=3)


def test_a_row_is_what_it_is_alone():
    long, short = ids(1, 50), ids(1, 33, seed=1)
    tokens = torch.cat([long, torch.nn.functional.pad(short, (17, 0))])
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    with decoding(sources=(0, 0, 2)) as model:
        together = written(model, tokens, 30, mask=mask)
        assert_close(together[0], written(model, long, 30)[0], atol=1e-5, rtol=1e-5)
        assert_close(together[1, 30:], written(model, short, 13)[0, 13:], atol=1e-5, rtol=1e-5)


def test_several_turns_of_a_padded_row_are_as_alone():
    """Prompts and single tokens in turn over one cache; where everything is kept it is dense attention."""
    long, short, dense = ids(1, 60), ids(1, 43, seed=1), make("llama")(ids(1, 43, seed=1)).logits[0]
    tokens, mask = torch.cat([long, torch.nn.functional.pad(short, (17, 0))]), torch.ones(2, 60, dtype=torch.long)
    mask[1, :17] = 0

    def turns(rows, given):
        """Logits of the last row; a second prompt comes behind 40 of its 60 columns, padding left out."""
        gone, cache = 60 - rows.shape[1], runtime.new_cache(model)
        first = written(model, rows[:, :40 - gone], 30 - gone, cache, given[:, :40 - gone])
        places = (given.cumsum(1) - 1).clamp(min=0)
        found = [first[-1]]
        for start, end in [(40, 50), *((i, i + 1) for i in range(50, 60))]:
            start, end = start - gone, end - gone
            out = model(rows[:, start:end], past_key_values=cache, attention_mask=given[:, :end],
                        position_ids=places[:, start:end])
            found.append(out.logits[-1])
        return torch.cat(found)[-43:]

    for keep in (2, 99):
        with decoding(keep=keep) as model:
            alone = turns(short, mask[1:, 17:])
            assert_close(turns(tokens, mask), alone, atol=1e-5, rtol=1e-5)
            assert (keep == 99) == torch.allclose(alone, dense, atol=1e-4)


def test_it_comes_back_from_a_checkpoint(tmp_path):
    tokens = ids(1, 40)
    with decoding(sources=(0, 0, 2)) as model:
        want = written(model, tokens, 20)
        llmopt.save(model, tmp_path / "out")
    loaded, _ = llmopt.load(tmp_path / "out")
    assert torch.equal(written(loaded, tokens, 20), want) and density(loaded, 1) < 1


def test_a_layer_reads_what_another_has_chosen(monkeypatch):
    asked, chosen = [], Held.chosen
    monkeypatch.setattr(Held, "chosen", lambda self, keep: asked.append(1) or chosen(self, keep))
    with decoding(sources=(0, 0, 2)) as model:
        written(model, ids(1, 40), 36)
    assert len(asked) == 4 * 2


def test_rows_that_change_places_and_copies_go_on_alike():
    tokens = ids(3, 40)
    with decoding() as model:
        want = written(model, tokens, 20)
        cache = runtime.new_cache(model)
        written(model, tokens[:, :31], 20, cache)
        twin, shorter = cache.fork(), cache.without_last()
        order = torch.tensor([2, 0])
        cache.reorder_cache(order)
        got = torch.cat([model(tokens[order, i:i + 1], past_key_values=cache).logits for i in range(31, 40)], 1)
        assert_close(got, want[order, 31:], atol=1e-5, rtol=1e-5)
        for copy, start in ((twin, 31), (shorter, 30)):
            got = torch.cat([model(tokens[:, i:i + 1], past_key_values=copy).logits for i in range(start, 40)], 1)
            assert_close(got, want[:, start:], atol=1e-5, rtol=1e-5)


def test_a_token_that_is_taken_back_leaves_no_mean():
    """The last block is complete with the token that goes, and another one comes in its place."""
    tokens = ids(1, 40)
    other = tokens.clone()
    other[0, 31] = tokens[0, 31] % 90 + 1
    with decoding() as model:
        cache = runtime.new_cache(model)
        written(model, tokens[:, :32], 20, cache)
        model(tokens[:, 32:33], past_key_values=cache)
        back = cache.without_last().without_last()
        got = torch.cat([model(other[:, i:i + 1], past_key_values=back).logits for i in range(31, 40)], 1)
        assert_close(got, written(model, other, 20)[:, 31:], atol=1e-5, rtol=1e-5)


def test_copies_that_part_have_means_of_their_own():
    tokens, others = ids(1, 44), ids(1, 44, seed=1)
    others[:, :30] = tokens[:, :30]
    with decoding() as model:
        want = [written(model, x, 20)[:, 30:] for x in (tokens, others)]
        cache = runtime.new_cache(model)
        written(model, tokens[:, :30], 20, cache)
        plain = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.lanes.buffers)
        assert cache.nbytes() == plain + 3 * 2 * 7 * 16 * 4                 # layers, KV heads, blocks, D, float32
        twin = cache.fork()
        for copy, given, wanted in ((cache, tokens, want[0]), (twin, others, want[1])):
            got = torch.cat([model(given[:, i:i + 1], past_key_values=copy).logits for i in range(30, 44)], 1)
            assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [kv.Streaming(budget=24, sinks=2), kv.Quant(bits=8)])
def test_what_a_kv_method_has_left_is_read_in_full(method):
    tokens = ids(1, 60)
    with runtime.attached(make("llama"), method) as model:
        want = written(model, tokens, 40)
    with decoding() as model, runtime.attached(model, method):
        assert_close(written(model, tokens, 40), want, atol=1e-5, rtol=1e-5)


def test_layers_with_a_window_read_their_window():
    tokens = ids(1, 40)
    with decoding("gemma3_text") as model:
        written(model, tokens, 20)
        assert [density(model, layer) < 1 for layer in range(3)] == [False, True, False]
    with decoding("gemma3_text", sources=(0, -1, 2)) as model:
        assert_close(written(model, tokens, 20), make("gemma3_text")(tokens).logits, atol=1e-5, rtol=1e-5)


def test_what_is_written_is_decided_by_what_is_written():
    """Equal layers take over each other's choice; each of the last queries counts by itself."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.load_state_dict(model.model.layers[0].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    rows = [{"input_ids": ids(2, 200), "attention_mask": torch.ones(2, 200, dtype=torch.long)}]
    method = Reuse(**FIELDS, sparsity=1.0, computed=0.0)
    found = method.plan(model, Run(batches=rows)).meta
    assert found["sources"] == [0, 0, 0] and found["overlap"][0] == [1, 1, 1]
    with torch.no_grad():
        seen = method._mass(model, ids(1, 200), method._begins(200))
    assert seen[0].shape == (2, 128, 50)
    assert_close(seen[0].sum(-1), torch.ones(2, 128))
    causal, far = method._choice(method._begins(200), 50)
    assert causal[0].sum() == 72 // 4 + 1 and far[0].nonzero().flatten().tolist() == [*range(1, 18)]
    assert float(seen[1][:, ~causal].abs().max()) == 0
