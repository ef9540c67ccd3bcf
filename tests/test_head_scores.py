"""Head scores for every family: by step or file, of the heads that pruning has left."""
import json

import pytest
import torch

import llmopt
from llmopt.calibration.head_scores import find
from llmopt.errors import LlmoptError
from llmopt.heads import Span
from llmopt.kv import SnapKV
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny

DENSE = [[.1, .2, .3, .4], [1., 2., 3., 4.], [5., 6., 7., 8.]]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": DENSE}))
    return str(path)


def test_scores_of_a_file_follow_the_heads_through_two_prunings(file):
    """Two KV groups of two heads each; then the first layer leaves, and one head of what is left of the third."""
    model, run = tiny.make("llama"), Run()
    run.scores["heads.x"] = [torch.tensor(row) for row in DENSE]
    assert [row.tolist() for row in find(file, run, model)] == [pytest.approx(row) for row in DENSE]
    apply_plan(model, [LayerPlan(), LayerPlan(skip=("attention",)), LayerPlan(kv_groups=torch.tensor([1]))], run)
    expected = [DENSE[0], [], [7., 8.]]
    for name in (file, "heads.x"):
        assert [row.tolist() for row in find(name, run, model)] == [pytest.approx(row) for row in expected]
    apply_plan(model, [LayerPlan(drop=True), LayerPlan(), LayerPlan(heads=torch.tensor([1]))], run)
    for name in (file, "heads.x"):
        assert [row.tolist() for row in find(name, run, model)] == [[], [8.]]


def test_scores_of_other_heads_say_so(file):
    run, said = Run(), "scores.json holds scores of other heads than this model has: 3 layers of 4 heads; the model has"
    with pytest.raises(LlmoptError, match=f"{said} 2 layers of 4 heads"):
        find(file, run, tiny.make("llama", num_hidden_layers=2))
    model = tiny.make("llama")
    apply_plan(model, [LayerPlan(), LayerPlan(), LayerPlan(kv_groups=torch.tensor([0]))], Run())
    with pytest.raises(LlmoptError, match=r"the model has \[4, 4, 2\] heads by layer"):
        find(file, run, model)                       # pruned in another run: nobody knows which heads these are
    with pytest.raises(LlmoptError, match=r"no score step 'heads.spam' \(did you mean 'heads.span'"):
        find("heads.spam", Run(scores={"heads.span": []}), model)
    with pytest.raises(LlmoptError, match="there is no file none.json"):
        find("none.json", run, model)


def test_a_recipe_prunes_between_a_file_of_scores_and_the_cache_that_reads_it(tmp_path):
    """Before, the scores of the dense model's heads were refused behind any pruning."""
    model, ids = tiny.make("llama"), tiny.ids(4, 32)
    run = Run(batches=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    Span().apply(model, run)
    llmopt.heads.save_scores(tmp_path / "s.json", "heads.span", run.scores["heads.span"], {})
    prune, shares = llmopt.prune.Magnitude(ratio=0.5, units=["kv_groups"]), []
    for heads in (str(tmp_path / "s.json"), "heads.span"):
        model = tiny.make("llama")
        report = llmopt.compress(model, [Span(), prune, SnapKV(ratio=.5, window=8, allocate="heads", heads=heads)], ids)
        shares.append(report.records[-1]["meta"]["shares"])
        assert [len(s) for s in shares[-1]] == [block.kv_heads for block in blocks(model)] == [1, 1, 1]
    assert shares[0] == shares[1]
