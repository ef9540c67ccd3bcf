"""prune.plan: what stays of every layer from a file, as save() writes it, and files that hold something else."""
import json
from pathlib import Path

import pytest
import torch

import llmopt
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.modeling import is_skipped
from llmopt.prune import ByPlan, Depth, Magnitude, Tyr, Wanda
from llmopt.prune.plan_file import layers_of, read_layers
from llmopt.quant import RTN
from tests import tiny

CONTRACT = {"path": str(Path(__file__).parent / "plan.json")}            # a plan that every architecture can follow
DATA = [{"input_ids": tiny.ids(8, 48), "attention_mask": torch.ones(8, 48, dtype=torch.long)}]


def written(path, *layers) -> str:
    path.write_text(json.dumps({"layers": list(layers)}))
    return str(path)


def logits(model):
    return model(tiny.ids(2, 16, seed=5)).logits


def test_a_search_written_beside_its_checkpoint_is_made_again(tmp_path):
    first = tiny.make("llama")
    report = llmopt.compress(first, [Tyr(ratio=0.3, iterations=1, generations=2, offspring=3, tokens=(48,),
                                         survivors=())], DATA)
    llmopt.save(first, tmp_path / "out", report=report)
    again = tiny.make("llama")
    step = ByPlan(path=str(tmp_path / "out"))
    assert step.reads == (str(tmp_path / "out" / "plan.json"),) and step.needs_data
    told = step.apply(again, Run(DATA)).meta
    assert told["removed_share"] == pytest.approx(report.records[0]["meta"]["removed_share"])
    assert told["removed_units"] == report.records[0]["meta"]["removed_units"]
    assert told["layers"] == report.records[0]["meta"]["layers"]


def test_numbers_are_filled_by_the_criterion_and_lists_are_kept(tmp_path):
    plan = written(tmp_path / "p.json", {"ffn": 48, "kv_groups": [1]}, {"skip": ["mlp"]}, {"ffn": [*range(32, 80)]})
    one, other = tiny.make("llama"), tiny.make("llama")
    step = ByPlan(path=plan, criterion="magnitude", refit=False)
    foretold = predict(tiny.make("llama"), [step]).steps[0][1]
    told = step.apply(one, Run()).meta
    assert told["removed_units"] == {"ffn": 96, "kv_groups": 1, "mlp": 1}
    assert f"{told['removed_share']:.1%} of the blocks' parameters" in foretold
    Magnitude(ratio=0.5, units=["ffn"], refit=False).apply(other, Run())                # 48 of 96 everywhere
    layers, others, dense = (model.model.layers for model in (one, other, tiny.make("llama")))
    assert torch.equal(layers[0].mlp.down_proj.weight, others[0].mlp.down_proj.weight)
    assert torch.equal(layers[2].mlp.down_proj.weight, dense[2].mlp.down_proj.weight[:, 32:80])
    assert layers[0].self_attn.k_proj.out_features == 16 and layers[2].self_attn.k_proj.out_features == 32
    with pytest.raises(LlmoptError, match="calibration data"):
        ByPlan(path=plan).apply(tiny.make("llama"), Run())


def test_whole_parts_leave_first_and_what_stays_is_fitted(tmp_path):
    plan = written(tmp_path / "p.json", {"ffn": 64}, {"drop": True}, {"skip": ["mlp"], "heads": 2})
    model = tiny.make("llama")
    told = ByPlan(path=plan).apply(model, Run(DATA)).meta
    names = [[one["name"].removeprefix("model.layers.") for one in told[key]] for key in ("repair", "refit")]
    assert names == [["0.mlp.down_proj", "2.self_attn.o_proj"], ["0.mlp.down_proj", "1.self_attn.o_proj"]]
    assert len(model.model.layers) == 2 and model.model.layers[0].mlp.down_proj.in_features == 64
    assert is_skipped(model.model.layers[1].mlp) and model.model.layers[1].self_attn.o_proj.in_features == 32


def test_the_plans_of_several_steps_become_one():
    model, report = tiny.make("llama"), []
    for step in (Magnitude(ratio=0.5, units=["kv_groups"], refit=False), Depth(ratio=0.34, protect=False),
                 Wanda(ratio=0.5, units=["ffn"])):
        report.append({"method": step.name, "meta": step.apply(model, Run(DATA)).meta})
    plan = layers_of(report)
    gone = report[1]["meta"]["removed"][0][0]
    assert plan.pop(gone) == {"drop": True}
    assert all(entry["ffn"] == 48 and len(entry["heads"]) == 2 and len(entry["kv_groups"]) == 1 for entry in plan)
    twice = [{"method": "prune.magnitude", "meta": {
        "layers": [{"layer": 0, "dropped": False, "skip": [], "ffn": 96, "heads": heads}],
        "dense": [{"heads": count, "width": 96}]}} for heads, count in (([1, 2, 3], 4), ([0, 2], 3))]
    assert layers_of(twice) == [{"heads": [1, 3]}]
    assert layers_of([{"method": "quant.rtn", "meta": {}}]) is None


def test_a_rehearsal_of_one_block_takes_an_entry_that_keeps_it(tmp_path):
    plan = written(tmp_path / "p.json", {"ffn": 48}, *[{"drop": True}] * 4)
    model = tiny.make("llama", num_hidden_layers=1)
    assert ByPlan(path=plan).apply(model, Run(DATA, layers=5)).meta["removed_units"] == {"ffn": 48}
    with pytest.raises(LlmoptError, match="it has 5 layers, this model 7"):
        ByPlan(path=plan).apply(model, Run(DATA, layers=7))


def test_bits_and_layers_share_one_file(tmp_path):
    model = tiny.make("llama")
    report = llmopt.compress(model, [Magnitude(ratio=0.5, units=["ffn"], refit=False),
                                     RTN(group_size=16, overrides={"o_proj": {"bits": 8}})])
    llmopt.save(model, tmp_path / "out", report=report)
    assert read_layers(str(tmp_path / "out")) == [{"ffn": 48}] * 3
    assert set(json.loads((tmp_path / "out" / "plan.json").read_text())) == {"layers", "modules"}


@pytest.mark.parametrize(("layers", "said"), [
    ([{}], "is the plan of another model: it has 1 layers, this model 3"),
    ([{}, {"ffn": 500}, {}], r"layers.1: ffn: 500 cannot stay of 96, 96 can"),
    ([{}, {"heads": 3}, {}], r"layers.1: heads: 3 cannot stay of 4, [24] can"),
    ([{}, {"ffn": [1, 96]}, {}], r"layers.1: the plan is for another model: of its ffn, 0 to 95, it keeps 1 to 96"),
    ([{}, {"fnn": 5}, {}], "layer 1: 'fnn' is not a key \\(did you mean 'ffn'\\?\\)"),
    ([{}, {"ffn": "half"}, {}], "layer 1: ffn is half, how many stay"),
    ([{}, {"skip": ["ffn"]}, {}], r"layer 1: skip is \['ffn'\], some of attention, mlp expected"),
    ([{}, {"drop": 1}, {}], "layer 1: drop is 1, true or false"),
    ([{}, 7, {}], "layer 1: 7 given"),
    ([{"heads": 2}, {"kv_groups": 1}, {}], "one kind for all layers"),
    ([{"heads": 2, "kv_groups": [0]}, {}, {}], "layer 0: heads and kv_groups expected as two lists"),
    ([{"drop": True}] * 3, "no layer with attention would remain")])
def test_bad_plans_are_named(layers, said, tmp_path):
    model, before = tiny.make("llama"), logits(tiny.make("llama"))
    with pytest.raises(LlmoptError, match=said):
        ByPlan(path=written(tmp_path / "p.json", *layers)).apply(model, Run(DATA))
    assert torch.equal(logits(model), before)


def test_files_that_hold_no_plan(tmp_path):
    with pytest.raises(LlmoptError, match="there is no file"):
        read_layers(str(tmp_path))
    (tmp_path / "plan.json").write_text('{"modules": {}}')
    with pytest.raises(LlmoptError, match="holds no plan; expected ..layers"):
        read_layers(str(tmp_path))
