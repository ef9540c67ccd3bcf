"""The calibration walk: observers see what a whole forward shows them, and no more of a block runs than they read."""
import pytest
import torch

from llmopt.calibration.walk import walk
from llmopt.model.blocks import blocks
from tests import tiny


def batches():
    ids, mask = tiny.ids(4, 24), torch.ones(4, 24, dtype=torch.long)
    mask[1, 17:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "phi3", "mixtral"])
def test_observers_see_the_inputs_of_a_whole_forward(family):
    model = tiny.make(family)
    names = [p.name for p in blocks(model)[1].projections()]
    whole, seen = {name: [] for name in names}, {name: [] for name in names}
    for p in blocks(model)[1].projections():
        p.module.register_forward_pre_hook(lambda module, args, name=p.name: whole[name].append(args[0]))
    for batch in batches():
        model(**batch, use_cache=False)
    expected = {name: [x[b["attention_mask"].bool()] for x, b in zip(found, batches(), strict=True)]
                for name, found in whole.items()}
    visit = list(walk(model, batches()))[1]
    for name in names:                                     # each alone, then all of them in one go
        visit.observe({name: lambda x, name=name: seen[name].append(x)})
    visit.observe({name: lambda x, name=name: seen[name].append(x) for name in names})
    for name in names:
        assert len(seen[name]) == 4
        assert all(torch.equal(a, b) for a, b in zip(seen[name], expected[name] * 2, strict=True))


def test_nothing_runs_behind_the_last_reader():
    model = tiny.make("llama")
    visit = next(walk(model, batches()))
    ran = []
    for p in visit.block.projections():
        p.module.register_forward_hook(lambda *_, name=p.name: ran.append(name.rpartition(".")[2]))
    reader = {p.name: p for p in visit.block.projections()}
    for last, expected in (("q_proj", []), ("o_proj", ["q_proj", "k_proj", "v_proj"]),
                           ("gate_proj", ["q_proj", "k_proj", "v_proj", "o_proj"])):
        ran.clear()
        visit.observe({next(name for name in reader if name.endswith(last)): lambda x: None})
        assert ran == expected * 2                         # of two batches
