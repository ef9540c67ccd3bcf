"""Head scores for every family: by step or file, of the heads that pruning has left."""
import json
from dataclasses import replace

import pytest
import torch

import llmopt
from llmopt.attention import AShape
from llmopt.calibration.head_scores import check_known, find
from llmopt.errors import LlmoptError
from llmopt.heads import Influence, Span
from llmopt.kv import SnapKV
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.quant import RTN
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


def below_0(self, model, run):
    return {"scores": [torch.full((4,), -1.0) for _ in range(3)]}


READERS = [(AShape(heads="heads.influence", min_length=0), "scores below 0, or none above it, which are no shares"),
           (SnapKV(ratio=.5, allocate="heads", heads="heads.influence"), "no score above 0"),
           (RTN(bits=3.5, widths=(3, 4), allocate="heads", heads="heads.influence", group_size=32), "do not say how")]


@pytest.mark.parametrize(("reader", "said"), READERS, ids=lambda given: getattr(given, "name", ""))
def test_scores_that_a_later_step_cannot_use_are_refused_before_weights_change(reader, said, monkeypatch, tmp_path):
    """Of a step, and of a file; behind a step that prunes nobody knows yet which heads will be left."""
    model, ids, name = tiny.make("llama"), tiny.ids(2, 16), reader.name
    before = llmopt.transform.FoldNorms() if reader.stage == "quant" else RTN(group_size=32)
    monkeypatch.setattr(Influence, "measure", below_0)
    with pytest.raises(LlmoptError, match=rf"steps\.2 {name}: heads: heads.influence holds.*{said}"):
        llmopt.compress(model, [Influence(), before, reader], ids)
    (tmp_path / "s.json").write_text(json.dumps([[-1.0] * 4] * 3))
    of_file = replace(reader, heads=str(tmp_path / "s.json"))
    with pytest.raises(LlmoptError, match=rf"steps\.1 {name}: heads: .*s.json holds.*{said}"):
        llmopt.compress(model, [before, of_file], ids)
    assert torch.equal(model(ids).logits, tiny.make("llama")(ids).logits)
    check_known([llmopt.prune.Magnitude(ratio=0.5), of_file], Run(), model)


def test_a_dry_run_refuses_them_too(monkeypatch, tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "ids.jsonl").write_text(json.dumps(tiny.ids(1, 48)[0].tolist()) + "\n")
    recipe = {"model": {"id": str(tmp_path / "model")}, "data": {"name": "ids", "path": str(tmp_path / "ids.jsonl")}}
    shared = {"attention.a_shape": {"min_length": 0, "heads": "heads.influence"}}
    monkeypatch.setattr(Influence, "measure", below_0)
    steps = [{"heads.influence": {}}, shared]
    with pytest.raises(LlmoptError, match=r"steps.1 attention.a_shape: heads: heads.influence holds scores below 0"):
        llmopt.dry_run(recipe | {"steps": steps})
    (tmp_path / "s.json").write_text(json.dumps([[1.0] * 4] * 2))
    with pytest.raises(LlmoptError, match=r"steps.1 attention.local_heads: heads: .* of other heads than this model"):
        llmopt.dry_run(recipe | {"steps": [{"quant.rtn": {"group_size": 32}}, {"attention.local_heads": {
            "heads": str(tmp_path / "s.json")}}]})
