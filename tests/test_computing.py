"""Weights stay in the type of the checkpoint, whatever type is computed in."""
import copy

import pytest
import torch
from safetensors.torch import load_file

import llmopt
from llmopt.errors import LlmoptError
from llmopt.model import computing
from llmopt.recipe.reader import Recipe, parse
from llmopt.run.opening import Streaming
from llmopt.run.pipeline import run
from llmopt.specs import DataSpec, ModelSpec
from tests import tiny

STEPS = "steps: [{quant.rtn: {}}]"


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_bf16_model_computes_as_its_float32_twin(family):
    model = tiny.make(family, torch.bfloat16)
    twin = copy.deepcopy(model).float()
    computing.choose(model, "float32", "cpu")
    with torch.no_grad(), computing.computing(model):
        logits = model(tiny.ids()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, twin(tiny.ids()).logits, rtol=1e-3, atol=1e-3)     # Gemma scales in bf16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tiny.ids()).logits.dtype == torch.bfloat16


def test_what_is_written_does_not_depend_on_it_but_in_values(tmp_path):
    tiny.make("llama", torch.bfloat16).save_pretrained(tmp_path / "m")
    rows = tmp_path / "ids.jsonl"
    rows.write_text("".join(f"{row}\n" for row in tiny.ids(8, 32).tolist()))
    steps = (llmopt.heads.Span(), llmopt.quant.GPTQ(bits=3, group_size=16))
    made, reports = {}, {}
    for name, compute in (("fp32", "float32"), ("bf16", "bfloat16"), ("streamed", "float32")):
        stream = name == "streamed"                     # which has no room for scores of the whole model
        recipe = Recipe(model=ModelSpec(id=str(tmp_path / "m"), compute_dtype=compute), steps=steps[stream:],
                        data=DataSpec(name="ids", path=str(rows)))
        reports[name] = run(recipe, tmp_path / name, streaming=Streaming(force=stream))
        made[name] = load_file(tmp_path / name / "model.safetensors")
    layout = {name: {k: (t.dtype, t.shape) for k, t in tensors.items()} for name, tensors in made.items()}
    assert layout["fp32"] == layout["bf16"] and torch.float32 not in {dtype for dtype, _ in layout["fp32"].values()}
    assert any(not torch.equal(made["fp32"][k], made["bf16"][k]) for k in made["fp32"])
    assert all(torch.equal(made["fp32"][k], made["streamed"][k]) for k in made["fp32"])
    sizes = {name: (r.dense_bytes, r.predicted_bytes, r.cache_before) for name, r in reports.items()}
    assert sizes["fp32"] == sizes["bf16"] == sizes["streamed"]


def test_auto_is_what_the_machine_has_instructions_for(monkeypatch):
    for flags, dtype, expected in (({"avx2": True}, torch.bfloat16, torch.float32), ({}, torch.float16, torch.float32),
                                   ({"avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
                                   ({"amx_bf16": True}, torch.float16, torch.float32),
                                   ({}, torch.float32, torch.float32), ({}, torch.float64, torch.float64)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=flags: told)
        assert computing.fast_type(dtype) == expected


@pytest.mark.parametrize("room", [0, 10**9])
def test_a_packed_model_is_scored_with_its_stored_values(room, tmp_path):
    model = tiny.make("llama", torch.bfloat16)
    llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=16)])
    fresh, _ = llmopt.load(llmopt.save(model, tmp_path / "out"))
    computing.choose(fresh, "float32", "cpu")
    computing.convert(fresh, room)
    with torch.no_grad(), computing.computing(fresh):
        logits = fresh(tiny.ids()).logits
    torch.testing.assert_close(logits, copy.deepcopy(model).float()(tiny.ids()).logits, rtol=0, atol=1e-5)


def test_a_recipe_names_the_type():
    assert parse(f"model: {{compute_dtype: float32}}\n{STEPS}", "r.yaml").model.compute_dtype == "float32"
    with pytest.raises(LlmoptError, match="compute_dtype"):
        parse(f"model: {{compute_dtype: fp8}}\n{STEPS}", "r.yaml")
