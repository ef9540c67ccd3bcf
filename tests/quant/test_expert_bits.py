"""Bits of experts by measured damage: who is decided together, by hand, plans on the way there and back."""
import re

import pytest
import torch

import llmopt
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.quant import GPTQ, RTN
from llmopt.quant.grid import Spec, round_to_nearest
from tests import tiny
from tests.quant.quant_data import batches, loaded_plain, logits

SIXTEEN = {"group_size": 16}


def allocated(how: str, model=None, step=GPTQ, **fields):
    """(model, meta) once the bits of experts and all else are shared out by measured damage."""
    model = model or tiny.make("qwen3_moe")
    step = step(**{"bits": 3, "group_size": 16, "allocate": "sensitivity", "widths": (2, 4), "experts": how,
                   "plans": 1, "trial_tokens": 48} | fields)
    return model, step.apply(model, Run(batches())).meta


FULL = pytest.mark.full


@pytest.mark.parametrize(("how", "choices", "step"), [
    ("model", 1, GPTQ), ("stack", 6, RTN), ("expert", 12, RTN), pytest.param("layer", 3, GPTQ, marks=FULL),
    pytest.param("expert", 12, GPTQ, marks=FULL), pytest.param("model", 1, RTN, marks=FULL)])
def test_bits_are_shared_out_among_experts_that_are_decided_together(how, choices, step):
    _, meta = allocated(how, step=step)
    assert 2 < meta["bits"] <= 3
    units = meta["allocation"]["scores"]
    assert len(units) == 2 * 3 + choices                             # q k v, o of each layer
    taken = {}
    for name, told in meta["modules"].items():
        if ".experts." in name:
            layer, stack, number = name.split(".")[2], *name.split(".")[-2:]
            unit = {"model": 0, "layer": layer, "stack": (layer, stack), "expert": (layer, number)}[how]
            taken.setdefault(unit, set()).add((told["bits"], told["group_size"]))
    assert len(taken) == choices and all(len(found) == 1 for found in taken.values())
    for damage in units.values():
        assert damage["2/16"] != damage["4/16"] and min(damage.values()) > 0
    assert min(plan["measured"] for plan in meta["allocation"]["plans"]) > 0


def test_the_experts_that_matter_get_more_bits():
    model = tiny.make("qwen3_moe")
    for index, strength in enumerate((0.02, 4.0, 0.02)):
        model.model.layers[index].mlp.experts.down_proj.data *= strength
    _, meta = allocated("layer", model, step=RTN, ignore=("self_attn",), bits=8 / 3)
    bits = [meta["modules"][f"model.layers.{index}.mlp.experts.gate_up_proj.0"]["bits"] for index in range(3)]
    assert bits == [2, 4, 2]


def test_the_damage_of_all_experts_is_that_of_a_model_with_all_of_them_rounded():
    """By hand: every expert of every layer at 2 bits, attention as at the level."""
    _, meta = allocated("model", step=RTN, trial_tokens=10 ** 6)
    model, dense = tiny.make("qwen3_moe"), tiny.make("qwen3_moe")
    RTN(bits=4, overrides={"experts": {"bits": 2}}, **SIXTEEN).apply(model, Run())
    sums, count = 0.0, 0
    with torch.no_grad():
        for batch in batches():
            p, q = (m(**batch).logits[batch["attention_mask"].bool()].log_softmax(-1) for m in (dense, model))
            sums, count = sums + float((p.exp() * (p - q)).sum()), count + len(p)
    assert meta["allocation"]["scores"]["experts"]["2/16"] == pytest.approx(sums / count, rel=1e-4)


def test_a_plan_with_experts_is_printed_loads_plainly_and_is_taken_back(tmp_path, caplog):
    model, fields = tiny.make("qwen3_moe"), {"bits": 3.5, "allocate": "sensitivity", "group_sizes": (16, 32),
                                                     "widths": (3, 4), "plans": 1, "trial_tokens": 48}
    caplog.set_level("INFO")
    report = llmopt.compress(model, [RTN(**fields, **SIXTEEN)], batches())
    folder = llmopt.save(model, tmp_path / "out", report=report)
    assert re.search(r"plan: model\.layers\.1: .*, experts\.gate_up_proj experts\.down_proj \d/\d+$", caplog.text, re.M)
    (_, fresh, mine), = loaded_plain({str(folder): model}, tmp_path)
    assert torch.equal(fresh, mine)
    again = tiny.make("qwen3_moe")
    llmopt.compress(again, [RTN(plan=str(folder / "plan.json"))])
    assert torch.equal(logits(again), logits(model))
    most = predict(tiny.make("qwen3_moe"), [RTN(bits=3, **SIXTEEN)]).bytes
    third = tiny.make("qwen3_moe")
    fields = {"allocate": "sensitivity", "widths": (2, 3, 4), "plans": 1, "trial_tokens": 48}
    llmopt.compress(third, [RTN(bytes=most, **fields, **SIXTEEN)], batches())
    llmopt.save(third, tmp_path / "third")
    assert 0.9 * most < sum(file.stat().st_size for file in (tmp_path / "third").glob("*.safetensors")) <= most


@FULL
def test_stacks_that_read_by_columns_take_trials_as_well():
    model, meta = allocated("stack", tiny.make("gpt_oss"), step=RTN)
    assert len(meta["allocation"]["scores"]) == 6 + 6
    stack = meta["modules"]["model.layers.1.mlp.experts.down_proj.2"]
    mine, theirs = (m.model.layers[1].mlp.experts.down_proj[2] for m in (model, tiny.make("gpt_oss")))
    rounded = round_to_nearest(theirs.T.contiguous(), Spec(stack["bits"], 16, clip=True)).dequantize(torch.float32)
    assert torch.equal(mine, rounded.T)


@pytest.mark.parametrize(("step", "said"), [
    (RTN(bits=3, allocate="sensitivity", group_size=32, group_sizes=(64,)),
     r"down_proj\.0: none of the group_sizes \[64\] divides its 32 input features and the 64 of others that"),
    (RTN(bits=3.5, allocate="sensitivity", experts="layer", group_size=16), "all of them have the same bits")])
def test_what_cannot_be_decided_together_is_named(step, said):
    with pytest.raises(LlmoptError, match=said):
        predict(tiny.make("qwen3_moe"), [step])
    assert step.experts == "model" or predict(tiny.make("qwen3_moe"), [step], "dense").steps


def test_experts_are_decided_apart_by_an_allocation_alone():
    with pytest.raises(LlmoptError, match="experts: 'layer' given, model, or one of lim"):
        RTN(experts="layer")
