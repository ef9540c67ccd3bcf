"""Layer reuse: the programme against all ways there are, what is chosen once and read again."""
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from llmopt import runtime
from llmopt.attention import Reuse, reuse
from llmopt.attention.grid import top
from llmopt.attention.policy import sources
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from tests import tiny

CONTRACT = {"block": 4, "keep": 1, "min_length": 0, "sparsity": 0.7}       # fields for tests/test_contract.py
BY_HAND = torch.tensor([[1, 0.9, 0.2, 0.1], [0, 1, 0.8, 0.7], [0, 0, 1, 0.3], [0, 0, 0, 1]])


def test_the_programme_by_hand():
    assert sources(BY_HAND, 0) == [0, 0, 0, 0]
    assert sources(BY_HAND, 1) == [0, 1, 1, 1]
    assert sources(BY_HAND, 3) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_against_all_ways(seed):
    generator = torch.Generator().manual_seed(seed)
    overlap = (torch.rand(6, 6, generator=generator) * 20).round() / 20
    overlap.fill_diagonal_(1)
    for changes in range(6):
        found, best = sources(overlap, changes), (-1.0, -1.0)
        for chooses in product((False, True), repeat=5):
            if sum(chooses) <= changes:
                path = [0]
                for layer, own in enumerate(chooses, 1):
                    path.append(layer if own else path[-1])
                told = [float(overlap[source, layer]) for layer, source in enumerate(path)]
                best = max(best, (min(told), round(sum(told), 6)))
        told = [float(overlap[source, layer]) for layer, source in enumerate(found)]
        assert (min(told), round(sum(told), 6)) == best


@contextmanager
def restored(sources, **fields):
    """A model with a method whose record says so."""
    model, method = tiny.make("llama"), Reuse(block=4, keep=2, min_length=0, **fields)
    method.restore(model, Record({"sources": sources}))
    yield model
    runtime.detach(model)


def test_a_layer_reads_by_the_choice_of_another(monkeypatch):
    ids, asked = tiny.ids(1, 48), []
    monkeypatch.setattr(reuse, "top", lambda *given: asked.append(1) or top(*given))
    with restored([0, 0, 2]) as model:
        taken_over = model(ids).logits
        assert len(asked) == 2
    with restored([0, 1, 2]) as model:
        assert not torch.equal(model(ids).logits, taken_over)
        assert len(asked) == 5
    with restored([-1, -1, -1]) as model:
        everything = model(ids).logits
    torch.testing.assert_close(everything, tiny.make("llama")(ids).logits, atol=1e-5, rtol=1e-5)


def test_equal_layers_take_over_each_other_s_choice():
    """Three layers of the same weights that add nothing: what one chooses is what the others would."""
    model = tiny.make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.load_state_dict(model.model.layers[0].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    run = Run(batches=[{"input_ids": tiny.ids(2, 64), "attention_mask": torch.ones(2, 64, dtype=torch.long)}])
    found = Reuse(block=4, keep=2, sparsity=1.0, computed=0.0).plan(model, run).meta
    assert found["sources"] == [0, 0, 0]
    assert found["overlap"][0] == [1, 1, 1] and found["ratio90"][0] == pytest.approx(found["ratio90"][2])
    found = Reuse(block=4, keep=2, sparsity=0.6, computed=1.0).plan(model, run).meta
    assert found["sources"].count(-1) == 2


def test_chance_is_no_overlap():
    run = Run(batches=[{"input_ids": tiny.ids(2, 64), "attention_mask": torch.ones(2, 64, dtype=torch.long)}])
    found = Reuse(block=4, keep=2, sparsity=1.0, computed=1.0, guard=0.9).plan(tiny.make("llama"), run).meta
    assert found["sources"] == [0, 1, 2] and found["overlap"][0][1:] == [0, 0]


@pytest.mark.parametrize("given", [[0, 1], [0, 2, 2], [0, 0, 1], [-2, 1, 2]])
def test_records_that_no_programme_gives_are_refused(given):
    with pytest.raises(LlmoptError, match="3 layers, each of which"):
        Reuse().restore(tiny.make("llama"), Record({"sources": given}))


def test_rows_must_offer_a_choice():
    run = Run(batches=[{"input_ids": tiny.ids(1, 64), "attention_mask": torch.ones(1, 64, dtype=torch.long)}])
    with pytest.raises(LlmoptError, match="^no row of the data has more than 17 blocks of 64 tokens"):
        Reuse().plan(tiny.make("llama"), run)
