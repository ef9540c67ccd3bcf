"""prune.heads: the heads leave that a step or a file scores least."""
import json

import pytest
import torch

import llmopt
from llmopt.errors import FieldError, LlmoptError
from llmopt.heads import Gradient
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Heads, Magnitude
from tests import tiny

CONTRACT = {"ratio": 0.5, "heads": "heads.span"}
BEFORE = {"heads.span": {}}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
SCORES = [[1., 2, 9, 0, 3, 3, -1, 5], [8., 7, 6, 5, 4, 3, 2, 1], [0., 1, 0, 2, 0, 3, 0, 4]]


def data():
    ids = tiny.ids(4, 24)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def scored(rows=SCORES):
    return Run(scores={"heads.mine": [torch.tensor(row) for row in rows]})


def pruned(**fields):
    model = tiny.make("llama", **EIGHT)
    record = Heads(heads="heads.mine", refit=False, **fields).apply(model, scored())
    assert model(tiny.ids()).logits.isfinite().all()
    return record.meta["layers"]


def test_groups_and_heads_by_hand():
    kept = pruned(ratio=0.5, units=["kv_groups"])
    assert [layer["kv_groups"] for layer in kept] == [[1, 2], [0, 1], [2, 3]]       # means 1.5 4.5 3 2, and so on
    kept = pruned(ratio=0.5, units=["kv_groups"], of_group="max")
    assert [layer["kv_groups"] for layer in kept] == [[1, 3], [0, 1], [2, 3]]       # the largest: 2 9 3 5
    kept = pruned(ratio=0.5, units=["q_heads"])
    assert [layer["heads"] for layer in kept] == [[1, 2, 5, 7], [0, 2, 4, 6], [1, 3, 5, 7]]


def test_layers_compare_by_the_scores_as_they_are():
    kept = pruned(ratio=0.5, units=["kv_groups"], scope="global")
    assert [layer.get("kv_groups", [0, 1, 2, 3]) for layer in kept] == [[1, 2], [0, 1, 2], [3]]


def test_scores_of_a_file_are_those_of_the_model_as_it_was_opened(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"scores": SCORES}))
    model, run = tiny.make("llama", **EIGHT), scored()
    record = Magnitude(ratio=0.5, units=["kv_groups"], refit=False).apply(model, run)
    left = [layer["heads"] for layer in record.meta["layers"]]
    method = Heads(ratio=0.5, heads=str(tmp_path / "s.json"), refit=False)
    assert method.reads == (str(tmp_path / "s.json"),)
    found = method.rate_all(model, run)
    for layer in range(3):
        own = torch.tensor(SCORES[layer])[left[layer]].view(2, 2).mean(1)
        assert torch.equal(found[layer]["kv_groups"], own)


def test_a_step_in_front_of_it_scores_and_the_plan_says_so():
    model = tiny.make("llama", **EIGHT)
    before = [block.attn_out.weight.clone() for block in blocks(model)]
    report = llmopt.compress(model, [Gradient(), Heads(ratio=0.25)], data())
    scores = report.records[0]["meta"]["scores"]
    for layer, row in zip(report.records[1]["meta"]["layers"], scores, strict=True):
        gone = set(range(4)) - set(layer["kv_groups"])
        assert gone == {int(torch.tensor(row).view(4, 2).mean(1).argmin())}
    assert [block.kv_heads for block in blocks(model)] == [3, 3, 3] and len(before) == 3
    told = Heads(ratio=0.25, refit=False).sketch(tiny.make("llama", **EIGHT), Run(), tiny.make("llama", **EIGHT))
    assert told.startswith("removes about 25.0% of kv_groups: 3 kv_groups") and "weights alone" not in told


def test_what_cannot_be_is_named():
    with pytest.raises(FieldError, match="units.*one of kv_groups, q_heads"):
        Heads(units=["ffn"])
    model = tiny.make("llama", **EIGHT)
    with pytest.raises(LlmoptError, match="heads: no score step 'heads.gradient'"):
        Heads(refit=False).apply(model, Run())
    with pytest.raises(LlmoptError, match="heads.mine holds scores of other heads than this model has"):
        Heads(heads="heads.mine", refit=False).apply(model, scored([[1.0, 2.0]] * 3))
    with pytest.raises(LlmoptError, match="heads.mine holds scores that are not finite"):
        Heads(heads="heads.mine", refit=False).apply(model, scored([[float("nan")] * 8] * 3))
