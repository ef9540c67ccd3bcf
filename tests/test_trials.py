"""What sets of choices cost: measured as KL to the dense model in one walk, which leaves the model as it was."""
import copy

import pytest
import torch

from llmopt.calibration.trials import Trials, sample, without
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny
from tests.test_walk import batches


@torch.no_grad()
def divergence(dense, model, rows) -> float:
    total = [torch.nn.functional.kl_div(model(**row).logits.log_softmax(-1), dense(**row).logits.log_softmax(-1),
                                        log_target=True, reduction="none").sum(-1) for row in rows]
    return float(torch.cat(total, 1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_trials_are_what_models_with_these_weights_would_give(family):
    """Up weights are halved in all blocks but the first; one trial drops the writer of block 1, one that of block 2."""
    model, dense = tiny.make(family), tiny.make(family)
    rows, run = sample(batches(), 0, 2048), Run(batches())
    trials, gone = Trials(model, run, rows, ("halved",)), {1: "one", 2: "two"}
    for index, (visit, own) in enumerate(trials.visits(run.batches[:1], "trials")):
        assert len(visit.inputs) == 1 and len(own.inputs) == len(rows)
        halved = {} if index == 0 else {p.name: p.weight * 0.5 for p in own.block.ffn_in[-1:]}
        writer = own.block.ffn_out
        now = {gone.get(index): halved | {writer.name: writer.weight * 0}}
        trials.through(own, lambda name, now=now, halved=halved: now.get(name, halved),
                       {gone[index]: "halved"} if index in gone else {})
    found = trials.damage()
    assert set(found) == {"halved", "one", "two"}
    for name, dropped in (("halved", None), ("one", 1), ("two", 2)):
        by_hand = copy.deepcopy(dense)
        for block in blocks(by_hand)[1:]:
            block.ffn_in[-1].write(block.ffn_in[-1].weight * 0.5)
        if dropped:
            blocks(by_hand)[dropped].ffn_out.write(blocks(by_hand)[dropped].ffn_out.weight * 0)
        assert found[name] == pytest.approx(divergence(dense, by_hand, rows), rel=1e-3)
    before = dense.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_parts_and_blocks_are_left_out(family):
    model, dense, run = tiny.make(family), tiny.make(family), Run(batches())
    rows = sample(batches(), 0, 2048)
    trials = Trials(model, run, rows, ("without",))
    for index, (_, own) in enumerate(trials.visits([], "trials")):
        parts = {1: None, 2: without(own.block, ("attention",))}
        trials.through(own, lambda name, parts=parts, index=index: parts.get(index, {}))
    by_hand = copy.deepcopy(dense)
    apply_plan(by_hand, [LayerPlan(), LayerPlan(drop=True), LayerPlan(skip=("attention",))], Run())
    assert trials.damage()["without"] == pytest.approx(divergence(dense, by_hand, rows), rel=1e-3)
    hidden = [torch.cat([m(**row, output_hidden_states=True).hidden_states[-1][0] for row in rows])
              for m in (dense, by_hand)]
    if family == "llama":               # whose final norm leaves directions alone, its gains being 1
        wanted = 1 - torch.nn.functional.cosine_similarity(*hidden, dim=-1).mean()
        assert trials.turned()["without"] == pytest.approx(float(wanted), rel=1e-3)


def test_rows_are_drawn_by_seed_without_their_padding():
    rows = sample(batches(), 3, 2048)
    assert sorted(row["input_ids"].shape[1] for row in rows) == [17, 24, 24, 24]
    assert all(bool(row["attention_mask"].all()) for row in rows)
    again, other = sample(batches(), 3, 2048), sample(batches(), 4, 2048)
    same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True)]
    assert all(same) and [r["input_ids"].tolist() for r in rows] != [r["input_ids"].tolist() for r in other]
    assert len(sample(batches(), 3, 50)) == 2 and len(sample(batches(), 3, 1)) == 1
