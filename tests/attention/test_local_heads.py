"""Local heads: the lowest scores get the window; a record of other heads is refused."""
import pytest
import torch

from llmopt.attention import LocalHeads
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from tests import tiny

CONTRACT = {"window": 6, "min_length": 0}           # fields for tests/test_contract.py
BEFORE = {"heads.span": {}}                         # steps that it needs


def test_the_lowest_of_all_layers_become_local():
    model = tiny.make("llama")
    scores = [torch.tensor(row) for row in ([4.0, 1.0, 9.0, 8.0], [7.0, 7.5, 6.0, 5.0], [2.0, 3.0, 10.0, 11.0])]
    run = Run(scores={"heads.span": scores})
    assert LocalHeads(share=0.5).plan(model, run).meta == {"local": [[0, 1], [2, 3], [0, 1]]}
    assert LocalHeads(share=0.25, lowest=False).plan(model, run).meta == {"local": [[2], [], [2, 3]]}
    assert LocalHeads(share=0).plan(model, run).meta == {"local": [[], [], []]}


@pytest.mark.parametrize("local", [[[0], [1]], [[0], [4], []], [[1, 0], [], []], [[0, 0], [], []]])
def test_a_record_of_other_heads_is_refused(local):
    with pytest.raises(LlmoptError, match=r"attention\.local_heads: (layer \d has|heads of 2 layers)"):
        LocalHeads().restore(tiny.make("llama"), Record({"local": local}))


def test_scores_must_be_there():
    with pytest.raises(LlmoptError, match="no score step 'heads.span' ran before"):
        LocalHeads().plan(tiny.make("llama"), Run())
