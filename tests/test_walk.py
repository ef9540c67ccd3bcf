"""The calibration walk: observers see what a whole forward shows them, and no more of a block runs than they read."""
import pytest
import torch

from llmopt.calibration.inputs import Inputs, each_weight
from llmopt.calibration.walk import walk
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.runtime.attention_rows import attention_rows
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


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
@torch.no_grad()
def test_attention_rows_of_a_block_are_those_of_a_whole_forward(family):
    """Inside a walk whose data are padded; a walk records masks of all pairs, which rows cannot be asked for."""
    model, data = tiny.make(family), batches()
    whole, seen = {}, {}
    for index, batch in enumerate(data):
        with attention_rows(model, lambda rows, index=index: whole.setdefault((rows.layer, index), rows)):
            model(**batch, use_cache=False)
    for visit in walk(model, data):
        visit.attention(lambda index, rows, layer=visit.block.index: seen.setdefault((layer, index), rows))
    assert seen.keys() == whole.keys() and len(seen) == 6
    for place, rows in seen.items():
        assert rows.layer == place[0] and torch.equal(rows.real, whole[place].real)
        torch.testing.assert_close(rows.weights[rows.real.unsqueeze(1).expand(rows.weights.shape[:3])],
                                   whole[place].weights[rows.real.unsqueeze(1).expand(rows.weights.shape[:3])],
                                   atol=1e-5, rtol=1e-4)
    assert not seen[0, 0].real.all()                       # there was padding


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_only_the_wanted_rows_are_shown_and_the_logits_stay(family):
    model, batch = tiny.make(family), batches()[0]
    expected, every, some = model(**batch, use_cache=False).logits, [], []
    with attention_rows(model, every.append):
        model(**batch, use_cache=False)
    with attention_rows(model, some.append, slice(-9, -2)):
        logits = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)
    for all_rows, rows in zip(every, some, strict=True):
        assert rows.queries.tolist() == list(range(15, 22)) and rows.weights.shape[2] == 7
        there = all_rows.weights[:, :, 15:22, rows.keys]
        torch.testing.assert_close(rows.weights[0], there[0], atol=1e-5, rtol=1e-4)


def test_tokens_may_be_weighed_by_the_attention_they_get():
    """Test c of the redesign: rows inside the token weights of a quantizer, on padded data, with edits on the way."""
    model, data, weighed = tiny.make("llama"), batches(), []

    def received(visit, run):
        columns = [torch.zeros(mask.shape) for mask in visit.masks]

        def see(index, rows):
            columns[index][:, rows.keys] += (rows.weights * rows.real[:, None, :, None]).sum((1, 2))

        visit.attention(see)
        weighed.append([column[mask] for column, mask in zip(columns, visit.masks, strict=True)])
        return weighed[-1]

    names = [p.name for block in blocks(model) for p in block.projections()]
    inputs = Inputs("moments", token_weights=received)
    for p, seen in each_weight(model, Run(data), names, "x", inputs):
        assert seen.tokens == 41 + 48
        p.write(p.weight * 0.9)
    assert len(weighed) == 3
    assert all(sum(float(w.sum()) for w in block) == pytest.approx(4 * 89, rel=1e-4) for block in weighed)   # 4 heads
