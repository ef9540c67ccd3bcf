"""Numbers of each head that a search finds: what a way of reading costs a head, who reads least, how they are read."""
import pytest
import torch
from llmopt_kernels import NONE
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import llmopt
from llmopt import attention as a
from llmopt import runtime
from llmopt.attention.search import measured
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.runtime.compression import ATTENTION
from tests.attention.test_patterns import drawn
from tests.kv.spine import CHANGES
from tests.tiny import ids, make

SMALL = {a.AShape: {"sinks": 1}, a.BlockTopK: {"block": 4, "first": 0}, a.Stem: {"block": 4, "stride": 4},
         a.VerticalSlash: {"always": 1, "queries": 8, "tile": 4}}
LEAST = {a.AShape: 0.5, a.BlockTopK: 0.4, a.Stem: 0.6, a.VerticalSlash: 0.5}


def data(rows=3, tokens=60):
    return Run([{"input_ids": ids(rows, tokens), "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_what_a_way_costs_is_what_the_slope_sees_of_the_heads_output(family):
    model, run, method, found = make(family, **CHANGES.get(family, {})), data(rows=1), a.AShape(sinks=1), {}
    block, tokens = blocks(model)[0], ids(1, 60)
    place = block.attn_out.module

    def keep(module, args):
        found["out"] = args[0]

    handle = place.register_forward_pre_hook(keep)
    loss = model(tokens, labels=tokens).loss
    slope, dense = torch.autograd.grad(loss, found["out"])[0], found["out"].detach()
    with runtime.attached(model, a.AShape(sinks=1, window=15, min_length=0)), torch.no_grad():
        model(tokens)
    handle.remove()
    moved = ((found["out"] - dense) * slope)[0].unflatten(-1, (block.heads, -1)).sum(-1)             # [T, H]
    want = moved.double().square().sum(0)
    costs = measured(method, [{"window": 0.25}, {"window": 1.0}], model, run)
    assert_close(costs.errors[0][:, 0], want, rtol=1e-3, atol=1e-12)
    assert float(costs.errors[0][:, 1].max()) < 1e-6 * float(want.max())
    if family == "llama":
        assert costs.pairs[0].tolist() == [[sum(min(i + 1, 16) for i in range(60)), 60 * 61 // 2]] * 4
        assert costs.dense[0].tolist() == [60 * 61 // 2] * 4


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_oss", "qwen3_next"])
def test_who_reads_everything_loses_nothing(family):
    model = make(family)
    costs = measured(a.AShape(sinks=0, min_length=0), [{"window": 0.1}, {"window": 1.0}], model, data(rows=2))
    attending = [block.index for block in blocks(model) if block.attention is not None]
    assert sorted(costs.errors) == attending
    for layer in attending:
        little, everything = costs.errors[layer].T
        assert (little > 1e4 * everything.max()).all()
        assert costs.pairs[layer][:, 1].tolist() == costs.dense[layer].tolist()


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.name)
def test_a_head_that_nothing_depends_on_reads_least(kind):
    model, method = make("llama"), kind(density=LEAST[kind], rows=2, min_length=0, **SMALL[kind])
    with torch.no_grad():
        blocks(model)[1].attn_out.module.weight[:, :16] = 0                                  # of head 0
    found, run = method.plan(model, data()).meta["numbers"], data(rows=2)
    assert found.keys() == method.tried.keys()
    assert all(rows[1][0] == min(method.tried[name]) for name, rows in found.items())
    assert len({value for rows in found.values() for row in rows for value in row}) > 2
    with runtime.attached(model, method, run=run), torch.no_grad():
        model(run.batches[0]["input_ids"])
        stats = runtime.attachment(model).stats.values()
        share = sum(int(part.computed.sum()) for part in stats) / sum(int(part.dense.sum()) for part in stats)
        assert 0.7 * method.density < share < 1.05 * method.density


def test_found_numbers_are_parts_of_what_there_is():
    """Counted by hand, of 64 tokens or 16 blocks."""
    parts = [0.0, 0.25, 0.5, 1.0]

    def of(method, **names):
        q, k, _, state = drawn(64, 64)
        state.record.meta["numbers"] = {name: [parts] for name in method.tried} | names
        return method.select(q, k, state)

    lines = of(a.VerticalSlash(queries=4, always=0, tile=8), slash=[parts[::-1]])
    assert [int((row != NONE).sum()) for row in lines.verticals] == [0, 16, 32, 64]
    assert [int((row != NONE).sum()) for row in lines.diagonals] == [64, 32, 16, 0]
    assert of(a.AShape(sinks=2)).window.tolist() == [1, 16, 32, 64]
    for method in (a.BlockTopK(block=4, first=0), a.Stem(block=4, stride=4, first=0, decay=1.0)):
        taken = (of(method).blocks[:, -1] != NONE).sum(-1).tolist()
        assert taken == [0, *((4, 8, 15) if method.name == "attention.block_topk" else (3, 7, 15))]    # one is near


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.name)
@torch.no_grad()
def test_a_padded_row_is_what_it_is_alone_and_parts_of_1_are_dense(kind):
    """In two turns, too, over one cache."""
    model, tokens, mask = make("llama"), ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    places, dense = (mask.cumsum(-1) - 1).clamp(min=0), model(tokens[1:, 20:]).logits[0]
    method = kind(density=0.5, min_length=0, **SMALL[kind], **({"decay": 1.0} if kind is a.Stem else {}))
    for part in (0.1, 1.0):
        record = Record({"numbers": {name: [[part] * 4] * 3 for name in method.tried}})
        method.restore(model, record)
        alone = model(tokens[1:, 20:]).logits[0]
        padded = model(tokens, attention_mask=mask, position_ids=places).logits[1, 20:]
        assert_close(padded, alone, atol=1e-5, rtol=1e-5)
        assert (part == 1.0) == torch.allclose(alone, dense, atol=1e-4)
        apart = []
        for rows in (tokens[1:, 20:], tokens):                          # a first turn of 40 columns and a second of 20
            padding, cache, found = len(rows[0]) - 40, None, []
            seen = mask if padding else mask[1:, 20:]
            for turn in (slice(0, padding + 20), slice(padding + 20, None)):
                read = model(rows[:, turn], attention_mask=seen[:, :turn.stop], past_key_values=cache, use_cache=True,
                             position_ids=(seen.cumsum(-1) - 1).clamp(min=0)[:, turn])
                cache, found = read.past_key_values, [*found, read.logits[-1]]
            apart.append(torch.cat(found)[-40:])
        assert_close(*apart, atol=1e-5, rtol=1e-5)
        assert part < 1 or torch.allclose(apart[0], dense, atol=1e-4)
        runtime.detach(model)


def test_in_a_checkpoint(tmp_path):
    model, tokens = make("llama"), ids(2, 60)
    llmopt.compress(model, a.VerticalSlash(density=0.5, rows=2, min_length=0, **SMALL[a.VerticalSlash]), tokens)
    want, meta = model(tokens).logits, runtime.attachment(model).record(ATTENTION).meta
    llmopt.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, want) and runtime.attachment(again).record(ATTENTION).meta == meta


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(LlmoptError, match=r"density: 0.01 is out of reach: .* is 0\.0\d+ of the causal pairs"):
        a.AShape(sinks=1, density=0.01).plan(make("llama"), data())
    with pytest.raises(LlmoptError, match="needs calibration data"):
        a.AShape(density=0.5).plan(make("llama"), Run())
    beside = {a.AShape: {"ratio": 0.5}, a.BlockTopK: {"threshold": 0.5}, a.Stem: {"heads": "heads.span"}}
    for kind, fields in beside.items():
        with pytest.raises(FieldError, match=f"no {next(iter(fields))} beside it"):
            kind(density=0.5, **fields)


@pytest.mark.parametrize("numbers", [{}, {"keep": [[0.5] * 4] * 3}, {"window": [[0.5] * 4] * 2},
                                     {"window": [[0.5] * 4, [0.5] * 4, [2.0] * 4]}])
def test_records_of_other_searches_are_refused(numbers):
    with pytest.raises(LlmoptError, match=r"attention\.a_shape: numbers of window from 0 to 1 for each head"):
        a.AShape(density=0.5).restore(make("llama"), Record({"numbers": numbers}))
