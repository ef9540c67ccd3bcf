"""Attention sinks (`s_aux` of gpt-oss): a key of each head that everybody sees, whose value is 0, in all that acts."""
import pytest
import torch
from torch.testing import assert_close
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import llmopt
from llmopt import attention, kv
from llmopt.calibration import relevance, rereading
from llmopt.errors import LlmoptError
from llmopt.method import Record
from llmopt.runtime import attach
from llmopt.runtime.attention_rows import attention_rows
from tests import tiny
from tests.kv import spine
from tests.test_contract import applied, behaviour

COMBINATIONS = {name: steps for name, steps in spine.combinations().items() if not spine.turns(steps)}
SOME = ["snapkv", "kv-quant", "cam", "kvzip", "h2o"]


def made(**changes):
    """gpt_oss with sinks that draw much in some heads."""
    model = tiny.make("gpt_oss", **changes)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.sinks.data = torch.tensor([3.0, -1.0, 0.0, 5.0]).roll(index)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SOME else pytest.mark.full)
                                  for name in COMBINATIONS])
def test_a_combination_keeps_what_it_promises(name):
    model, steps = made(), [spine.fitted(step) for step in COMBINATIONS[name]]
    spine.assert_room_for_all_is_dense(model, steps)
    spine.assert_what_is_kept_is_the_prompts(model, steps)
    spine.assert_rows_and_attention(model, steps)
    spine.assert_a_row_of_padding_disturbs_nobody(model, steps)


@torch.no_grad()
def test_sparse_prompts_that_read_everything_are_dense_and_others_are_a_mask():
    model, ids = made(layer_types=["full_attention"] * 3), tiny.ids(2, 60)
    dense = model(ids).logits
    with llmopt.attached(model, attention.AShape(sinks=4, window=100, min_length=0)):
        assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-4)
    i = torch.arange(60)
    seen = (i <= i[:, None]) & ((i < 4) | (i[:, None] - i < 9))
    with llmopt.attached(model, attention.AShape(sinks=4, window=9, min_length=0)):
        assert_close(model(ids).logits, model_under(seen, ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sparse_attention_over_packed_sequences_and_over_kept_entries():
    model, ids = made(layer_types=["full_attention"] * 3), tiny.ids(2, 60)
    i = torch.arange(60)
    seen = (i <= i[:, None]) & ((i < 25) == (i[:, None] < 25))
    every = attention.AShape(sinks=0, window=100, min_length=0)
    with llmopt.attached(model, every):
        packed = model(ids, attention_mask=seen.expand(2, 1, -1, -1), use_cache=False).logits
    assert_close(packed, model_under(seen, ids), atol=1e-5, rtol=1e-4)
    turns, found = (40, 20), []
    for more in ([], [every]):
        with llmopt.attached(model, kv.SnapKV(budget=12, window=4), *more):
            found.append(spine.read(model, ids, torch.ones_like(ids), turns)[0])
    assert_close(*found, atol=1e-5, rtol=1e-4)


def model_under(seen, ids):
    """Logits of plain transformers where query i sees what seen[i] says."""
    mask = torch.zeros(len(ids), 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return made(layer_types=["full_attention"] * 3)(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def test_rows_of_attention_are_the_models_and_the_sink_has_its_part():
    model, ids = made(), tiny.ids(2, 40)
    want, got = model(ids, output_attentions=True, use_cache=False).attentions, {}
    with attention_rows(model, lambda rows: got.setdefault(rows.layer, rows)):
        model(ids, use_cache=False)
    for layer, rows in got.items():
        assert_close(rows.weights, want[layer], atol=1e-6, rtol=1e-5)
    assert float(got[1].weights.sum(-1)[:, 0].max()) < 0.9 and len(got) == 3


@pytest.mark.parametrize("name", ["heads.span", "heads.gradient", "heads.retrieval", "attention.act",
                                  "attention.flexprefill"])
def test_methods_run_on_it(name, monkeypatch):
    monkeypatch.setattr("tests.test_contract.dense", lambda *_: made())
    dense, (model, _, scores) = behaviour(made()), applied(name, "gpt_oss")
    if name.startswith("heads."):
        assert all(torch.isfinite(layer).all() and layer.std() > 0 for layer in scores[name])
    assert torch.equal(behaviour(model)[0], dense[0]) == name.startswith("heads.")


def test_packed_sequences_are_refused_by_name():
    model, ids = made(), tiny.ids(1, 20)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with llmopt.attached(model, kv.SnapKV(budget=8, window=2)), torch.no_grad(), \
            pytest.raises(LlmoptError, match="4-D attention masks cannot be combined with .*attention sinks"):
        model(ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_attention_that_is_calibrated_by_nothing_is_dense():
    model, ids = made(), tiny.ids(2, 40)
    dense = model(ids).logits
    as_it_is = attention.Act(beta=1, threshold=0, times=0, queries=1, edges=0, filter=False)
    attach(model, as_it_is, Record({"heads": [[0, 1, 2, 3]] * 3}))
    assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("function", [rereading.reread_attention, relevance.constant_attention])
def test_what_calibration_looks_through_is_the_models_attention(function):
    module = made().model.layers[1].self_attn
    module.__dict__[rereading.KEY] = [], 1
    query, keys, values = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    hidden = torch.full((9, 9), -torch.inf).triu(1)
    want, _ = eager_attention_forward(module, query, keys, values, hidden, 0.25)
    got, _ = function(module, query, keys, values, None, 0.25, s_aux=module.sinks)
    assert_close(got, want, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        got, _ = function(module, query, keys, values, None, 0.25, s_aux=module.sinks)
    assert_close(got, want, atol=1e-6, rtol=1e-5)
