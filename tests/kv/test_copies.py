"""Copies of a cache that was kept whole are what a prefill with the method attached would have left."""
import pytest
import torch

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.heads.replay import Replay
from llmopt.method import Record, Run
from llmopt.runtime import copies
from tests.tiny import ids, make

EVICTORS = {
    "streaming": kv.Streaming(ratio=0.6), "snapkv": kv.SnapKV(ratio=0.6, window=8, allocate="global"),
    "expected": kv.Expected(ratio=0.6, window=4, allocate="profile"), "h2o": kv.H2O(ratio=0.6, allocate="ada"),
    "kvzip": kv.KVzip(ratio=0.6, chunk=32), "kvzip demoted": kv.KVzip(ratio=0.6, allocate="uniform", demote=0.5),
    "kvzap": kv.KVzap(ratio=0.6, window=4, allocate="captured"), "kvzap hidden": kv.KVzap(ratio=0.6, features="hidden"),
    "merged": kv.KeyDiff(ratio=0.6, reduce="ems_merge"), "noncausal": kv.NonCausal(budget=20),
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def given(request):
    """(model, run with what heads.replay has read)."""
    model = make(request.param)
    run = Run([{"input_ids": ids(3, 80, seed=5), "attention_mask": torch.ones(3, 80, dtype=torch.long)}])
    Replay(pieces=3, length=80, chunk=40, sinks=1, window=4).apply(model, run)
    return model, run


def planned(method, model, run):
    """What `plan` records; of a method that looks for white space, which needs a tokenizer, ids that stand for it."""
    if getattr(method, "demote", 1) < 1:
        return Record({"request": [], "structure": [3, 4, 5]})
    return method.plan(model, run)


def held(cache):
    """All that a cache holds, layer by layer."""
    return [[*layer.entries(), *([] if layer.kept is None else layer.kept.tensors())] for layer in cache.layers]


@pytest.mark.parametrize("store", [None, kv.Quant(bits=4, residual=8)], ids=["alone", "packed"])
@pytest.mark.parametrize("name", EVICTORS)
@torch.no_grad()
def test_a_copy_is_what_a_prefill_would_have_left(given, name, store):
    model, run = given
    text, rest = ids(2, 70), ids(2, 5, seed=9)
    parts = [(method, planned(method, model, run)) for method in (EVICTORS[name], store) if method is not None]
    with runtime.attached(model):
        for part in parts:
            runtime.attach(model, *part)
        want = model(text, use_cache=True).past_key_values
        with runtime.frozen(model):
            answers = model(rest, past_key_values=want.fork()).logits
    with copies.keeping(model):
        whole = copies.read(model, text)
        for _ in range(2):                                      # the first copy leaves no trace
            with whole.compressed(*parts) as cache:
                assert all(torch.equal(a, b) for own, other in zip(held(cache), held(want), strict=True)
                           for a, b in zip(own, other, strict=True))
                assert cache.entry_nbytes() == want.entry_nbytes() < want.dense_nbytes()
                assert torch.equal(model(rest, past_key_values=cache.fork()).logits, answers)


@torch.no_grad()
def test_copies_read_again_once_and_the_model_is_left_as_it_was(given):
    model, _ = given
    text, reads = ids(1, 70), []
    dense = model(text).logits
    handle = model.get_decoder().register_forward_pre_hook(lambda *given: reads.append(1))
    with copies.keeping(model):
        whole = copies.read(model, text)
        for ratio in (0.5, 0.8, 0.9):
            with whole.compressed((kv.KVzip(ratio=ratio, chunk=35), Record())) as cache:
                assert cache.layers[0].queries is None
        assert len(reads) == 1 + 2
        with whole.compressed((kv.KVzip(ratio=0.5, chunk=70), Record())):
            assert len(reads) == 1 + 2 + 1
        with pytest.raises(LlmoptError, match="attached already"), \
                whole.compressed((kv.KeyDiff(ratio=0.5), Record()), (kv.Knorm(ratio=0.5), Record())):
            pass
        again = whole.further(ids(1, 6, seed=4))
        assert [one.cache.layers[0].queries.shape[2] for one in (again, whole)] == [76, 70]
    handle.remove()
    assert runtime.attachment(model) is None and torch.equal(model(text).logits, dense)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "kvzap hidden", "noncausal"])
@torch.no_grad()
def test_a_scorer_sees_no_more_than_it_asks_for(given, name, monkeypatch):
    (model, run), method, seen = given, EVICTORS[name], []
    record, score = method.plan(model, run), type(method).score

    def spied(self, view):
        seen.append([None if x is None else x.shape for x in (view.queries, view.query_positions, view.hidden)])
        return score(self, view)

    monkeypatch.setattr(type(method), "score", spied)
    with runtime.attached(model):
        runtime.attach(model, method, record)
        model(ids(1, 70), use_cache=True)
    want = [*seen]
    seen.clear()
    with copies.keeping(model), copies.read(model, ids(1, 70)).compressed((method, record)):
        assert seen == want != []


@torch.no_grad()
def test_a_text_read_in_two_parts_is_one_text(given):
    model, run = given
    text, method = ids(1, 70), kv.SnapKV(ratio=0.6, window=8)
    with runtime.attached(model, method):
        want = model(text, use_cache=True).past_key_values
    with copies.keeping(model), copies.read(model, text[:, :61]).further(text[:, 61:]).compressed(
            (method, Record())) as cache:
        assert [layer.kept and layer.kept.positions.tolist() for layer in cache.layers] == \
            [layer.kept and layer.kept.positions.tolist() for layer in want.layers]
