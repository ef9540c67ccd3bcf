"""Checkpoints that are quantized already, read as the dense models that they stand for."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import llmopt
from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.facts import read_facts
from llmopt.errors import LlmoptError
from llmopt.files import tensors
from llmopt.model.loaded import unpack
from llmopt.model.loading import load_model
from llmopt.model.ways import dequantized
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call

E4M3 = torch.float8_e4m3fn
SCHEMES = ("W4A16", "W3A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")
FEW = ("W4A16", "W4A16_ASYM", "W8A8", "FP8", "NVFP4A16", "MXFP4A16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def dense(folder: Path, **more) -> dict[str, Tensor]:
    return load_model(ModelSpec(id=str(folder), dequantize=True, **more))[0].state_dict()


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scaled(weight: Tensor, kind: str, block: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, the values that both stand for) of a weight in fp8."""
    rows, columns = weight.shape
    size = {"tensor": (rows, columns), "channel": (1, columns), "blocks": block}[kind]
    counts = math.ceil(rows / size[0]), math.ceil(columns / size[1])
    codes, scales, values = torch.empty(rows, columns, dtype=E4M3), torch.empty(counts), torch.empty(rows, columns)
    for i in range(counts[0]):
        for j in range(counts[1]):
            place = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(E4M3)
            values[place] = codes[place].float() * scales[i, j]
    return codes, scales, values


def in_fp8(folder: Path, kind: str, name: str = "weight_scale_inv", block: tuple[int, int] = (32, 32), method="fp8",
           family: str = "llama") -> dict[str, Tensor]:
    """Write a tiny model in fp8; what its weights stand for, in bfloat16."""
    model = tiny.make(family, norms=True, dtype=torch.bfloat16, **({"intermediate_size": 80} if block[0] == 48 else {}))
    checkpoint.save(model, folder)
    (folder / "llmopt.json").unlink()
    stored, values = load_file(folder / "model.safetensors"), model.state_dict()
    for key in [key for key in stored if key.endswith("proj.weight")]:
        stored[key], scales, value = scaled(stored[key].float(), kind, block)
        stored[key.replace("weight", name)] = scales.squeeze() if kind == "tensor" else scales
        values[key] = value.bfloat16()
    stored["model.layers.0.mlp.down_proj.input_scale"] = torch.ones(())
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config={"quant_method": method, "activation_scheme": "dynamic", **(
        {"weight_block_size": list(block)} if kind == "blocks" else {})})
    return values


@pytest.mark.parametrize(("kind", "name", "method", "block"), [
    ("blocks", "weight_scale_inv", "fp8", (32, 32)), ("blocks", "weight_scale_inv", "fp8", (48, 48)),
    ("tensor", "weight_scale", "modelopt", (32, 32)), ("channel", "weight_scale", "fbgemm_fp8", (32, 32))])
def test_fp8_is_codes_times_scales(kind, name, method, block, tmp_path):
    wanted = in_fp8(tmp_path / "m", kind, name, block, method)
    found = dense(tmp_path / "m")
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    in_fp8(tmp_path / "m", "blocks")
    edit(tmp_path / "m", quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32],
                                              "modules_to_not_convert": ["lm_head"]})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=FineGrainedFP8Config(
        weight_block_size=(32, 32), dequantize=True, modules_to_not_convert=["lm_head"]), dtype=torch.bfloat16)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in dense(tmp_path / "m").items())


def test_experts_that_lie_one_by_one_are_put_together(tmp_path):
    wanted = in_fp8(tmp_path / "m", "blocks", family="qwen3_moe")
    single = {key: value for key, value in wanted.items() if ".experts." in key and key.endswith("_proj.weight")}
    found = dense(tmp_path / "m")["model.layers.1.mlp.experts.down_proj"]
    assert single and torch.equal(found[2], single["model.layers.1.mlp.experts.2.down_proj.weight"])


def test_scales_that_are_powers_of_two(tmp_path):
    in_fp8(tmp_path / "m", "blocks")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[f"{name}_scale_inv"] = torch.tensor([[120, 121], [122, 123]], dtype=torch.uint8)
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    found = dense(tmp_path / "m")[name]
    assert torch.equal(found[:32, 32:], (stored[name][:32, 32:].float() / 64).bfloat16())


@pytest.mark.parametrize("scheme", [pytest.param(s, marks=[] if s in FEW else pytest.mark.full) for s in SCHEMES])
def test_compressed_tensors_is_what_loads(scheme, tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32} if "BLOCK" in scheme else {}
    checkpoint.save(tiny.make("llama", norms=True, dtype=torch.bfloat16, **wide), tmp_path / "m")
    size = {} if scheme in ("W8A8", "FP8", "FP8_BLOCK") or "FP" in scheme else {"group_size": 32}
    report = llmopt.compress(str(tmp_path / "m"), llmopt.quant.RTN(scheme=scheme, **size))
    report.save(tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    unpack(loaded)
    wanted, found = loaded.state_dict(), dense(tmp_path / "q")
    for key in found:
        assert torch.equal(found[key], wanted[key]), key
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"],
                           load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*(self_attn|mlp).*proj$"]])
def test_targets_that_are_classes_or_patterns(targets, tmp_path):
    checkpoint.save(tiny.make("llama"), tmp_path / "m")
    llmopt.compress(str(tmp_path / "m"), llmopt.quant.RTN(bits=4, group_size=32)).save(tmp_path / "q")
    wanted, settings = dense(tmp_path / "q"), json.loads((tmp_path / "q" / "config.json").read_text())
    group = settings["quantization_config"]["config_groups"]["group_0"]
    edit(tmp_path / "q", quantization_config=settings["quantization_config"] | {"config_groups": {
        "group_0": group | {"targets": targets}}})
    assert all(torch.equal(wanted[key], value) for key, value in dense(tmp_path / "q").items())
    edit(tmp_path / "q", quantization_config=settings["quantization_config"] | {"config_groups": {
        "a": group | {"targets": ["Linear"]}, "b": group | {"targets": ["Embedding", "Linear"]}}})
    with pytest.raises(LlmoptError, match="no group of the quantization_config, or more than one"):
        dense(tmp_path / "q")


def test_experts_of_gpt_oss(tmp_path):
    parts = {"e.down_proj_blocks": torch.randint(0, 256, (2, 24, 3, 16), dtype=torch.uint8),
             "e.down_proj_scales": torch.randint(120, 130, (2, 24, 3), dtype=torch.uint8), "e.bias": torch.ones(2)}
    save_file(parts, tmp_path / "a.safetensors")
    stored = tensors.of_file(tmp_path / "a.safetensors")
    found = dequantized.dense(stored, {"quant_method": "mxfp4"}, torch.bfloat16, "m")
    made = tensors.read(found)["e.down_proj"]
    assert found.keys() == {"e.down_proj", "e.bias"} and made.shape == found["e.down_proj"].shape == (2, 96, 24)
    assert torch.equal(made, convert_moe_packed_tensors(parts["e.down_proj_blocks"], parts["e.down_proj_scales"]))


def test_streamed_as_whole_and_what_is_said(tmp_path, monkeypatch, capfd):
    in_fp8(tmp_path / "m", "blocks")
    words = ("compress", tmp_path / "m", "--bits", "4", "--method", "rtn", "--no-eval", "--output")
    assert call(monkeypatch, *words, tmp_path / "no") == 2
    assert "already quantized by fp8; start from the dense checkpoint, or read it as a dense model by --dequantize" in \
        capfd.readouterr().err
    for folder, more in (("whole", "--no-stream"), ("streamed", "--stream")):
        assert call(monkeypatch, *words, tmp_path / folder, more, "--dequantize") == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert one == other and "dequantize: true" in (tmp_path / "whole" / "recipe.yaml").read_text()
    assert "came from the checkpoint m, quantized by fp8: 21 weights were dequantized" in (
        tmp_path / "whole" / "README.md").read_text()
    assert "21 weights" in read_facts(tmp_path / "whole")["base_told"][0]
    assert call(monkeypatch, "show", tmp_path / "m") == 0
    assert "--dequantize" in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("method", "hint"), [("gptq", "start from the dense"), ("awq", "start from the dense"),
                                              ("bitsandbytes", r"model.dequantize\(\), then save_pretrained")])
def test_other_methods_are_refused_by_name(method, hint, tmp_path):
    checkpoint.save(tiny.make("llama"), tmp_path / "m")
    edit(tmp_path / "m", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(LlmoptError, match=f"quantized by {method}, whose numbers are not taken apart.*{hint}"):
        dense(tmp_path / "m")


def test_what_does_not_fit_is_one_line(tmp_path):
    in_fp8(tmp_path / "m", "blocks")
    file, name = tmp_path / "m" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    good = load_file(file)
    for changes, fact in (({f"{name}_scale_inv": torch.ones(5, 5)}, r"scale_inv is \[5, 5\], which fits neither"),
                          ({f"{name}_scale_inv": None}, "nothing in the files tells what .*up_proj.weight"),
                          ({name: torch.ones(96, 64, dtype=torch.int8)}, "holds torch.int8, not 8-bit floats"),
                          ({name: None}, "up_proj.weight_scale_inv.*belongs to"),
                          ({name: None, f"{name}_scale_inv": None}, "1 tensors missing")):
        save_file({key: value for key, value in (good | changes).items() if value is not None}, file, {"format": "pt"})
        with pytest.raises(LlmoptError, match=fact):
            dense(tmp_path / "m")
    checkpoint.save(tiny.make("llama"), tmp_path / "plain")
    with pytest.raises(LlmoptError, match="is not quantized; leave dequantize out"):
        dense(tmp_path / "plain")
