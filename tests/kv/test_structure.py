"""Tokens of structure: found by how often they occur, and their scores scaled down whatever the scorer."""
import pytest
import torch

from llmopt import kv, recipe, runtime
from llmopt.errors import LlmoptError
from llmopt.kv.structure import demoted, frequent_marks
from llmopt.method import Record, Run
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from tests.plans import contents
from tests.tiny import ids, make


class Words:
    """A tokenizer of five words; the last is a special one."""

    def decode(self, tokens):
        return ["the", ",", "\n\n", " 7", "<s>"][tokens[0]]


def batch(tokens):
    rows = torch.tensor([tokens])
    return [{"input_ids": rows, "attention_mask": (torch.arange(len(tokens)) < 1004).long()[None]}]


def test_structure_is_frequent_and_neither_letter_nor_digit():
    data = batch([0] * 600 + [1] * 300 + [2] + [3] * 99 + [4] * 4 + [2] * 500)      # what the mask hides does not count
    assert frequent_marks(data, Words()) == [1]
    assert frequent_marks(data, None) == [0, 1, 3, 4]
    with pytest.raises(LlmoptError, match="demote.*there is none"):
        frequent_marks(None, Words())


def test_scores_go_towards_the_lowest_by_hand():
    scores = torch.tensor([[2.0, 4.0, 8.0, -torch.inf], [-3.0, -1.0, 1.0, -torch.inf]])
    found = demoted(scores, torch.tensor([[5, 6, 5, -1], [5, 5, 6, -1]]), [5, 9], 0.5)
    assert found.tolist() == [[1.0, 4.0, 4.0, -torch.inf], [-3.0, -2.0, 1.0, -torch.inf]]
    assert demoted(torch.tensor([[2.0, 4.0]]), torch.tensor([[5, 6]]), [5], 0.5).tolist() == [[1.0, 4.0]]


@pytest.mark.parametrize("scorer", [kv.KeyDiff, kv.H2O, kv.SnapKV, kv.KVzip])
@torch.no_grad()
def test_marks_go_first_in_every_row_and_turn(scorer):
    model, tokens, mask = make("llama"), ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    tokens[:, ::2], mask[0, :7] = 11, 0
    run = Run(batches=[{"input_ids": tokens, "attention_mask": mask}])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    fields = {"budget": 12, "demote": 0.0, "sinks": 0, "allocate": "uniform"}
    fields |= {kv.SnapKV: {"window": 1}, kv.H2O: {"recent": 0.0}, kv.KVzip: {"window": 0}}.get(scorer, {})
    data = batch([11] * 500 + list(range(500)))
    with runtime.attached(model, scorer(**fields), run=Run(batches=data)):
        cache = None
        for part in (slice(0, 30), slice(30, 40)):
            cache = model(tokens[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache,
                          position_ids=places[:, part], use_cache=True).past_key_values
    assert run.batches is not None
    for layer in cache.layers:
        for row, _, where in layer.kept.heads():
            assert 11 not in tokens[row, layer.kept.positions[where].long()].tolist()


def test_a_streamed_run_counts_the_same_ids(tmp_path):
    plan = recipe.parse("data: {samples: 4, length: 64}\nsteps: [kv.snapkv: {ratio: 0.5, demote: 0.1}]\n", "t")
    for name, streaming in (("whole", Streaming(False)), ("streamed", Streaming(True))):
        report = pipeline.run(plan, tmp_path / name, streaming=streaming)
        assert report.streamed == streaming.force and report.records[0]["meta"]["structure"]
    assert contents(tmp_path / "whole") == contents(tmp_path / "streamed")


def test_it_travels_in_the_record_and_a_record_without_it_is_refused():
    model, method = make("llama"), kv.KeyDiff(ratio=0.5, demote=0.1)
    record = method.apply(model, Run(batches=batch([5] * 40 + [6] * 60)))
    assert record.meta["structure"] == [5, 6] and method.needs_data and not kv.KeyDiff(ratio=0.5).needs_data
    runtime.detach(model)
    method.restore(model, record)
    runtime.detach(model)
    for meta in ({}, {"structure": ["a"]}):
        with pytest.raises(LlmoptError, match="structure"):
            method.restore(model, Record(meta))


def test_ids_are_needed():
    model = make("llama")
    with runtime.attached(model, kv.KeyDiff(budget=8, demote=0.5), run=Run(batches=batch([5] * 40))), \
            pytest.raises(LlmoptError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 20, model.config.hidden_size), use_cache=True)
