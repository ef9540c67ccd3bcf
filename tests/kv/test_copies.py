"""Copies of a cache that was kept whole are what a prefill with the method attached would have left."""
import pytest
import torch

import llmopt
from llmopt import kv, runtime
from llmopt.heads.replay import Replay
from llmopt.method import Record, Run
from llmopt.runtime import copies
from tests.tiny import ids, make

EVICTORS = {
    "streaming": kv.Streaming(ratio=0.6), "snapkv": kv.SnapKV(ratio=0.6, window=8, allocate="global"),
    "expected": kv.Expected(ratio=0.6, window=4, allocate="profile"), "h2o": kv.H2O(ratio=0.6, allocate="ada"),
    "kvzip": kv.KVzip(ratio=0.6, chunk=32), "kvzip demoted": kv.KVzip(ratio=0.6, allocate="uniform", demote=0.5),
    "kvzap": kv.KVzap(ratio=0.6, window=4, allocate="captured"), "kvzap hidden": kv.KVzap(ratio=0.6, features="hidden"),
    "merged": kv.KeyDiff(ratio=0.6, reduce="ems_merge"), "noncausal": kv.NonCausal(budget=20), "none": None,
}


def prepared(family: str):
    """(model, run with what heads.replay has read)."""
    model = make(family)
    run = Run([{"input_ids": ids(3, 80, seed=5), "attention_mask": torch.ones(3, 80, dtype=torch.long)}])
    Replay(pieces=3, length=80, chunk=40, sinks=1, window=4).apply(model, run)
    return model, run


def state(cache):
    """What a cache holds, layer by layer."""
    return [[*layer.entries(), *([] if layer.kept is None else layer.kept.tensors())] for layer in cache.layers]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def given(request):
    return prepared(request.param)


@pytest.mark.parametrize("store", [None, kv.Quant(bits=4, residual=8)], ids=["alone", "packed"])
@pytest.mark.parametrize("name", EVICTORS)
@torch.no_grad()
def test_a_copy_is_what_a_prefill_would_have_left(given, name, store):
    model, run = given
    run.tokenizer = None
    text, rest = ids(2, 70), ids(2, 5, seed=9)
    methods = [method for method in (EVICTORS[name], store) if method is not None]
    parts = [(method, Record({"structure": [3, 4, 5], **({"request": []})}) if method.name == "kv.kvzip"
              else method.plan(model, run)) for method in methods]
    with runtime.attached(model):
        for part in parts:
            runtime.attach(model, *part)
        live = runtime.attachment(model)
        want = model(text, use_cache=True).past_key_values if live else model(text, use_cache=True).past_key_values
        with runtime.frozen(model):
            answers = model(rest, past_key_values=want.fork() if live else want).logits
    with copies.keeping(model):
        whole = copies.read(model, text)
        for _ in range(2):                                      # the copy before has left no trace
            with whole.compressed(*parts) as cache:
                assert_same(cache, want, live)
                got = model(rest, past_key_values=cache.fork()).logits
                assert torch.equal(got, answers) or not live and torch.allclose(got, answers, atol=1e-5)
        assert runtime.attachment(model).method("evicting kv method").name == "keeper"
    assert runtime.attachment(model) is None and not llmopt.runtime.runtime_config(model)["steps"]
