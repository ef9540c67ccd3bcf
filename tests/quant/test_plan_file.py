"""Budgets in bytes, and plans as files: written beside a checkpoint, changed by hand, read back, refused by name."""
import json
from types import SimpleNamespace

import pytest
import torch

import llmopt
from llmopt.errors import FieldError, LlmoptError
from llmopt.forecast.size import checkpoint_bytes, predict
from llmopt.method import Run
from llmopt.quant import GPTQ, RTN
from llmopt.quant.options import budget, stored, units_of
from llmopt.quant.plan_file import plans_of
from tests.quant.quant_data import batches, logits
from tests.tiny import make

SIZES = dict(group_sizes=(8, 32, -1), widths=(2, 3, 4, 6), group_size=32)
HEADS = {"heads.any": [torch.tensor([1.0, 2, 3, 1])] * 3}


def save(record, path) -> str:
    report = [{"method": "quant.rtn", "meta": record.meta}]
    path.write_text(json.dumps(next(plans_of(report))))
    return str(path)


@pytest.mark.parametrize(("fields", "dtype"), [
    (dict(allocate="zd", group_size=32), torch.float32), (dict(allocate="lim", group_size=32), torch.bfloat16),
    (dict(allocate="hessian", **SIZES), torch.float32), (dict(allocate="lrp", **SIZES), torch.bfloat16),
    (dict(allocate="heads", heads="heads.any", **SIZES), torch.float32)])
def test_the_file_is_as_large_as_the_budget_allows(fields, dtype):
    model = make("llama", dtype)
    RTN(bits=3, group_size=32).apply(model, Run())
    room = checkpoint_bytes(model)
    one = make("llama", dtype)
    step = RTN(bytes=room, **fields)
    foretold = predict(one, [step]).bytes
    step.apply(one, Run(batches(), scores=HEADS))
    assert (0.98 if "widths" in fields else 0.9) * room < checkpoint_bytes(one) <= room     # the latter: whole blocks
    assert 0.9 * room < foretold <= room


def test_prices_are_the_bytes_in_the_file():
    for symmetric, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        sizes = []
        for bits, size in ((3, 8), (5, -1)):
            model = make("llama", dtype)
            step = RTN(bits=bits, group_size=size, symmetric=symmetric)
            found = step.chosen(model)
            step.apply(model, Run())
            scale = torch.finfo(step.scale_type(dtype)).bits
            sizes.append((checkpoint_bytes(model), sum(stored(t, scale, symmetric, 32) for t in found)))
        (one, price), (other, less) = sizes
        assert one - other == pytest.approx(price - less, abs=100)              # the header's digits


def test_units_are_what_runs_as_one_and_take_the_sizes_that_fit():
    model = make("llama")                                                       # 64 columns, and 96 of down_proj
    step = RTN(bits=3, allocate="hessian", group_sizes=(64, 32, -1), widths=(3, 4, 16),
               overrides={"v_proj": {"bits": 8}, "1.mlp.down_proj": {"group_size": 16}})
    units = {unit.name.removeprefix("model.layers."): unit for unit in units_of(step, step.chosen(model))}
    assert len(units) == 12
    assert [t.name.rpartition(".")[2] for t in units["0.self_attn.q_proj"].members] == ["q_proj", "k_proj"]
    assert list(map(str, units["0.self_attn.o_proj"].choices)) == ["3/-1", "4/-1", "16/-1", "3/32", "4/32"]
    assert list(map(str, units["1.mlp.down_proj"].choices)) == ["3/16", "4/16", "16/16"]
    assert {c.group_size for c in units["2.mlp.down_proj"].choices} == {32, -1}


def test_a_plan_makes_the_same_weights_again_and_may_be_changed(tmp_path):
    model = make("llama")
    record = RTN(bits=3.4, allocate="hessian", **SIZES).apply(model, Run(batches()))
    plan, again = save(record, tmp_path / "plan.json"), make("llama")
    step = RTN(plan=plan)
    assert step.reads == (plan,) and not step.needs_data
    assert "bits by" in predict(again, [step]).steps[0][1]
    repeated = step.apply(again, Run())
    assert {k: (v["bits"], v["group_size"]) for k, v in repeated.meta["modules"].items()} == \
        {k: (v["bits"], v["group_size"]) for k, v in record.meta["modules"].items()}
    assert torch.equal(logits(again), logits(model))
    changed = json.loads((tmp_path / "plan.json").read_text())
    changed["modules"]["model.layers.1.mlp.down_proj"] = {"bits": 8, "group_size": 48}
    changed["modules"]["model.layers.2.mlp.down_proj"] = {"bits": 16}
    (tmp_path / "plan.json").write_text(json.dumps(changed))
    modules = RTN(plan=plan).apply(make("llama"), Run()).meta["modules"]
    assert (modules["model.layers.1.mlp.down_proj"]["bits"], len(modules)) == (8, len(record.meta["modules"]) - 1)


def test_a_checkpoint_holds_the_plan_that_repeats_it(tmp_path):
    report = llmopt.compress(make("llama"), [RTN(bits=3.4, group_size=32, allocate="zd")])
    report.save(tmp_path / "out")
    again = llmopt.compress(make("llama"), [RTN(plan=str(tmp_path / "out" / "plan.json"))])
    again.save(tmp_path / "again")
    for name in ("plan.json", "model.safetensors"):
        held = [(tmp_path / folder / name) for folder in ("out", "again")]
        assert not held[1].exists() or held[0].read_bytes() == held[1].read_bytes()
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.parametrize(("change", "words"), [
    (lambda held: held["modules"].pop("model.layers.1.mlp.up_proj"),
     "says nothing of model.layers.1.mlp.up_proj, which is quantized: is it the plan of another model"),
    (lambda held: held["modules"].update({"model.layers.9.mlp.up_proj": {"bits": 3}}),
     "model.layers.9.mlp.up_proj is no weight that is quantized here .did you mean 'model.layers.. ?"),
    (lambda held: held["modules"].update({"model.layers.1.mlp.up_proj": {"bits": 9}}),
     "model.layers.1.mlp.up_proj: bits 9 given, an integer from 2 to 8"),
    (lambda held: held["modules"].update({"model.layers.1.mlp.up_proj": {"bits": 3, "group_size": 0}}),
     "model.layers.1.mlp.up_proj: group_size 0 given"),
    (lambda held: held["modules"].update({"model.layers.1.mlp.up_proj": {"bits": 3, "group_size": 48}}),
     "model.layers.1.mlp.up_proj: group_size 48 does not divide its 64 input features"),
    (lambda held: held["modules"].update({"model.layers.1.mlp.up_proj": {"bits": 7, "group_size": 32}}),
     "gate_proj would be written at .*up_proj at 7 bits .* kernels run the two as one weight"),
    (lambda held: held.pop("modules"), "holds no plan; expected")])
def test_a_plan_that_does_not_fit_is_refused_by_name(change, words, tmp_path):
    plan = save(RTN(bits=3.4, allocate="zd", group_size=32).apply(make("llama"), Run()), tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    change(held)
    (tmp_path / "plan.json").write_text(json.dumps(held))
    with pytest.raises(LlmoptError, match=words):
        predict(make("llama"), [RTN(plan=plan)])
    with pytest.raises(LlmoptError, match="plan: there is no file .*none.json"):
        predict(make("llama"), [RTN(plan=str(tmp_path / "none.json"))])


def test_budgets_out_of_reach_tell_what_can_be_reached():
    model = make("llama")
    with pytest.raises(LlmoptError, match=r"1,000 bytes cannot be met; what can be chosen takes .* bytes to .* bytes"):
        predict(model, [RTN(bytes=1000, allocate="zd", group_size=32)])
    most = predict(model, [RTN(bits=8, group_size=32)]).bytes
    predict(model, [RTN(bytes=most, allocate="hessian", group_size=32)])
    with pytest.raises(LlmoptError, match=rf"{most + 8:,} bytes cannot be spent; what can be .* to [0-9,]+ bytes"):
        predict(model, [RTN(bytes=most + 8, allocate="hessian", group_size=32)])
    step = RTN(bits=2, allocate="hessian", group_size=32, overrides={"mlp": {"bits": 8}})
    with pytest.raises(LlmoptError, match="an average of 2 bits cannot be met; what can be chosen takes an average of "
                                          r"5\.\d+ bits to an average of 8 bits"):
        predict(model, [step])
    with pytest.raises(LlmoptError, match="none of the group_sizes .64. divides its 96 input features"):
        predict(model, [RTN(bits=3, allocate="hessian", group_size=32, group_sizes=(64,))])
    found = RTN(bits=3, group_size=32, allocate="zd")
    units = units_of(found, found.chosen(model))
    assert budget(found, model, found.chosen(model), units).told(0).endswith("bits")


def test_fields_that_contradict_each_other_are_named():
    for fields, key in ((dict(bytes=9000), "allocate"), (dict(group_sizes=(32,)), "allocate"),
                        (dict(group_sizes=(32,), allocate="lim"), "group_sizes"), (dict(allocate="heads"), "heads"),
                        (dict(heads="heads.span", allocate="lim"), "heads"),
                        (dict(plan="p.json", allocate="zd"), "allocate"),
                        (dict(plan="p.json", bytes=9), "bytes: 9 given, nothing"),
                        (dict(bytes=9000, bits=3, allocate="zd"), "bits: 3 given, nothing beside bytes"),
                        (dict(scheme="FP8", plan="p.json"), "plan")):
        with pytest.raises(FieldError, match=f"^{key}"):
            RTN(**fields)
    with pytest.raises(LlmoptError, match="heads.any holds scores below 0"):
        below = SimpleNamespace(scores={"heads.any": [torch.tensor([-1.0, 0, 0, 0])] * 3})
        RTN(bits=3, group_size=32, allocate="heads", heads="heads.any").apply(make("llama"), Run(**vars(below)))


def test_heads_that_matter_keep_their_attention():
    scores = {"heads.any": [torch.ones(4), torch.full((4,), 50.0), torch.ones(4)]}
    step = GPTQ(bits=2.5, group_size=32, allocate="heads", heads="heads.any", widths=(2, 3), sweeps=0)
    modules = step.apply(make("llama"), Run(batches(), scores=scores)).meta["modules"]
    kept = {name.split(".")[2]: entry["bits"] for name, entry in modules.items() if "q_proj" in name}
    assert kept["1"] > max(kept["0"], kept["2"])
