"""Edits side by side: the divergence of each is that of a model made so, and a beginning in common is run once."""
import copy

import pytest
import torch

from llmopt.calibration.prefixes import Prefixes, divergence
from llmopt.calibration.trials import sample
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks, replace_layers
from tests import tiny
from tests.test_walk import batches


def halved(block, choice):
    """0: as it is; 1: its FFN writes half; 2: gone."""
    return {0: {}, 1: {block.ffn_out.key.removeprefix(f"{block.name}."): block.ffn_out.module.weight * 0.5},
            2: None}[choice]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edits_are_what_models_made_so_would_give(family):
    model, dense = tiny.make(family), tiny.make(family)
    rows = sample(batches(), 0, 2048)
    prefixes, runs = Prefixes(model, Run(), rows, tiny.VOCABULARY), []
    for block in blocks(model):
        block.attention.register_forward_hook(lambda *given: runs.append(0))
    edits = [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 0, 0)]
    found = prefixes.damage(edits, range(len(rows)), halved)
    assert found[0] == found[4] == 0
    assert len(runs) == len(rows) * (1 + 2 + 4)                     # of the blocks: one, two and no third, four
    for edit, got in zip(edits[1:4], found[1:4], strict=True):
        made = copy.deepcopy(dense)
        for block, choice in zip(blocks(made), edit, strict=True):
            if choice == 1:
                block.ffn_out.write(block.ffn_out.weight * 0.5)
        if 2 in edit:
            replace_layers(made, [block.module for block, of in zip(blocks(made), edit, strict=True) if of != 2])
        assert got == pytest.approx(without_last(dense, made, rows), rel=1e-3)
    assert prefixes.damage([(0, 1, 0)], [1], halved) != prefixes.damage([(0, 1, 0)], [0], halved)


@torch.no_grad()
def without_last(dense, model, rows):
    total = [torch.nn.functional.kl_div(model(**row).logits.log_softmax(-1), dense(**row).logits.log_softmax(-1),
                                        log_target=True, reduction="none").sum(-1)[:, :-1] for row in rows]
    return float(torch.cat(total, 1).mean())


def test_divergence_on_the_support():
    noise = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 40, generator=noise)
    values, index = p.topk(40)
    full = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(values, q.gather(-1, index)), full)
    values, index = p.topk(7)
    a, b = (torch.stack([x[i, index[i]] for i in range(5)]).softmax(-1) for x in (p, q))
    torch.testing.assert_close(divergence(values, q.gather(-1, index)), (a * (a / b).log()).sum(-1))
    assert divergence(values, values + 3).abs().max() < 1e-6


def test_what_is_not_finite_is_told():
    model = tiny.make("llama")
    prefixes = Prefixes(model, Run(), sample(batches(), 0, 50), 8)
    with pytest.raises(LlmoptError, match="not finite"):
        prefixes.damage([(1, 0, 0)], [0], lambda block, choice: {
            name: value * float("inf") for name, value in halved(block, choice).items()})
