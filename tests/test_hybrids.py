"""Head scores and attention methods on models some of whose layers have no heads, from a step to a checkpoint.

The cache's methods are in kv/test_hybrids.py.
"""
import pytest
import torch

import llmopt
from llmopt import attention
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.parts import build
from llmopt.runtime.attach import detach
from tests import tiny
from tests.kv.test_hybrids import KINDS
from tests.test_contract import applied, behaviour

NAMES = [name for name in llmopt.names() if name.startswith(("heads.", "attention.")) and name != "heads.hess"]
PAIRS = [pytest.param(name, kind, marks=() if number % 2 == 0 and number // 2 % len(KINDS) == place else
                      pytest.mark.full) for number, name in enumerate(NAMES) for place, kind in enumerate(KINDS)]
FIVE = {"num_hidden_layers": 5, "layer_types": ["conv", "full_attention", "conv", "full_attention", "full_attention"]}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_method_acts_on_the_layers_that_attend_and_comes_back(name, kind, tmp_path):
    dense, (model, _, scores) = behaviour(tiny.make(kind)), applied(name, kind)
    logits, text = behaviour(model)
    if name.startswith("heads."):
        assert [len(layer) for layer in scores[name]] == [block.heads for block in blocks(model)]
        assert torch.cat([*scores[name]]).std() > 0 and torch.equal(logits, dense[0])
    elif name != "attention.reuse":                             # where one layer attends, it reads everything
        assert not torch.equal(logits, dense[0])
    llmopt.save(model, tmp_path / "out")
    again = behaviour(load(tmp_path / "out")[0])
    torch.testing.assert_close(again[0], logits, rtol=0, atol=1e-5)
    detach(model)
    assert again[1] == text and torch.equal(behaviour(model)[0], dense[0])


def test_choices_are_shared_by_layers_that_attend():
    model = tiny.make("lfm2", **FIVE)
    run = Run(batches=[{"input_ids": tiny.ids(4, 64), "attention_mask": torch.ones(4, 64, dtype=torch.long)}])
    shared = attention.Reuse(block=4, keep=2, sparsity=1.0, computed=0.3, guard=0.0, min_length=0)
    found = shared.plan(model, run).meta
    assert found["sources"] == [-1, 1, -1, 3, 3] and len(found["ratio90"]) == 3
    with llmopt.attached(model, shared, run=run), torch.no_grad():
        sparse = model(tiny.ids(1, 64)).logits
    with torch.no_grad():
        assert not torch.allclose(sparse, model(tiny.ids(1, 64)).logits, atol=1e-3)


def test_a_score_that_looks_at_rows_of_a_head_takes_a_table():
    with pytest.raises(LlmoptError, match="heads.hess takes the level 'structure'"):
        llmopt.compress(tiny.make("lfm2"), [build("heads.hess", {})], batches=tiny.ids())
