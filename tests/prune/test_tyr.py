"""prune.tyr: a search across channels, heads, parts and blocks ends in a model that is as it was measured."""
import json

import pytest
import torch

from llmopt.calibration.prefixes import Prefixes
from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.shapes import shapes
from llmopt.prune import Tyr
from llmopt.prune.tyr import divided
from tests import tiny
from tests.test_prefixes import without_last

SHORT = {"iterations": 1, "generations": 1, "offspring": 2, "tokens": [48], "survivors": []}
CONTRACT = SHORT | {"ratio": 0.35, "units": ["ffn", "attention", "mlp", "blocks"]}


def data(rows=8, length=48):
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tiny.ids(rows, length).split(4)]


def pruned(model, **fields):
    run = Run(batches=data())
    return Tyr(**SHORT | fields).apply(model, run).meta


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_cut_model_is_what_the_last_fitness_says_of_it(family):
    """Without a refit nothing changes between the search and the cut; the FFN and attention of a block are useless."""
    model, dense = tiny.make(family), tiny.make(family)
    with torch.no_grad():
        for one in (model, dense):
            for writer in (blocks(one)[1].attn_out, blocks(one)[1].ffn_out):
                writer.weight.mul_(0.1)
    meta = pruned(model, ratio=0.4, refit=False, tokens=[400], offspring=6, generations=2, levels=3,
                  units=["ffn", "attention", "blocks"])
    assert meta["removed_units"]["blocks"] == 1 and 0.33 < meta["removed_share"] <= 0.4
    assert len(blocks(model)) == 2 and meta["layers"][1]["dropped"]
    log = meta["search"][-1]
    assert log["fitness"] == sorted(log["fitness"], reverse=True) and log["fitness"][0] == min(log["seeds"].values())
    rows = divided(data(), 0, 400)[0]
    assert len(rows) == 2 and without_last(dense, model, rows) == pytest.approx(log["fitness"][-1], rel=1e-3)


def test_a_search_is_no_worse_than_the_same_widths_everywhere_and_repeats_itself():
    found = [pruned(tiny.make("llama"), ratio=0.25, units=["ffn", "kv_groups", "mlp"], generations=2, offspring=6,
                    iterations=2, tokens=[48, 192], survivors=[2], seed=3) for _ in range(2)]
    assert json.dumps(found[0]) == json.dumps(found[1])
    first, last = found[0]["search"]
    assert last["fitness"][-1] <= last["seeds"]["centre"] and first["fitness"][-1] <= first["seeds"]["uniform"]
    assert found[0]["removed_share"] <= 0.25 and all(one["refit"] <= one["cut"] for one in found[0]["refit"])


def test_kinds_keep_to_shares_of_their_own():
    model = tiny.make("qwen3", num_attention_heads=8, num_key_value_heads=4)
    meta = pruned(model, ratio=0.25, units=["ffn", "kv_groups"], budgets="each", generations=3, offspring=4,
                  criterion="obs", first_order=1, accumulate="centre", rounds=4)
    assert meta["removed_units"] == {"ffn": 3 * 24, "kv_groups": 3}
    assert list(meta["search"][0]["seeds"]) == ["uniform"]


def test_heads_leave_equally_from_every_group():
    model = tiny.make("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    meta = pruned(model, ratio=0.25, units=["q_heads"], levels=7)
    assert meta["removed_units"]["q_heads"] == 6
    assert all(shape.heads % 2 == 0 and shape.kv_heads == 2 for shape in shapes(model))


@pytest.mark.parametrize(("fields", "error", "says"), [
    ({"units": ["kv_groups", "q_heads"]}, FieldError, "exclude each other"),
    ({"budgets": "each"}, FieldError, "no blocks"), ({"scope": {"global": {}}}, FieldError, "local"),
    ({"levels": 4}, FieldError, "odd"), ({"tokens": [64, 48], "survivors": [2]}, FieldError, "grow"),
    ({"survivors": [2]}, FieldError, "0 whole numbers"),
    ({"units": ["blocks"], "ratio": 0.35, "offspring": 8}, FieldError, "less than 8"),
    ({"units": ["blocks"], "ratio": 0.2}, BudgetError, "less than one unit"),
    ({"units": ["blocks"], "ratio": 0.9}, BudgetError, "leave 0.667"),
    ({"units": ["ffn"], "ratio": 0.9, "minimum": 0.5}, BudgetError, "leave 0.500"),
    ({"units": ["attention"], "ratio": 0.9}, BudgetError, "leave 0.667"),
])
def test_what_cannot_be_is_named(fields, error, says):
    with pytest.raises(error, match=says):
        pruned(tiny.make("llama"), **fields)
    if error is BudgetError:                                        # which a plan says as well
        with pytest.raises(LlmoptError, match=says):
            predict(tiny.make("llama"), [Tyr(**SHORT | fields)])


def test_no_data_and_layers_that_must_be_alike():
    with pytest.raises(LlmoptError, match="needs calibration data"):
        Tyr(**SHORT).apply(tiny.make("llama"), Run())
    with pytest.raises(LlmoptError, match="mixtral: per_layer_shapes cannot be stored"):
        pruned(tiny.make("mixtral"), units=["kv_groups"])
    with pytest.raises(LlmoptError, match="phi3: per_layer_heads cannot be stored"):
        pruned(tiny.make("phi3"), units=["kv_groups"])
    assert Tyr(ratio=0, **SHORT).apply(tiny.make("llama"), Run(batches=data())).meta["removed_share"] == 0


def test_the_dense_logits_and_the_candidates_are_made_once(monkeypatch):
    """A run that is cut off finds the candidates of each part, and whole iterations, where it had left them."""
    from llmopt.scale.memory import Memory

    made = {}

    class Kept(Memory):
        def keep_named(self, name, make):
            assert name not in made
            made[name] = make()
            return made[name]

        @property
        def reading(self):
            return self

    calls = []
    monkeypatch.setattr(Prefixes, "_largest", lambda self, *given, plain=Prefixes._largest: calls.append(0)
                        or plain(self, *given))
    Tyr(**SHORT | {"ratio": 0.2, "iterations": 2, "units": ["ffn"]}).apply(
        tiny.make("llama"), Run(batches=data(), memory=Kept()))
    assert len(calls) == 1 and set(made) == {f"supernet {i} {b} mlp" for i in (1, 2) for b in range(3)}


def test_what_the_search_sees_is_not_what_candidates_are_fitted_on():
    batches = data(16, 24)
    batches[1]["attention_mask"][2, 20:] = 0
    search, rest = divided(batches, 1, 96)
    assert len(search) == 4 and sum(len(batch["input_ids"]) for batch in rest) == 12
    seen = {tuple(row["input_ids"][0, :20].tolist()) for row in search}
    fitted = {tuple(row[:20].tolist()) for batch in rest for row in batch["input_ids"]}
    assert not seen & fitted and len(seen | fitted) == 16
    assert len(divided(batches, 1, 50)[0]) == 2 and len(divided(batches, 1, 9999)[0]) == 4
    one = [{name: x[:1] for name, x in batches[0].items()}]
    assert len(divided(one, 0, 50)[0]) == len(divided(one, 0, 50)[1]) == 1
