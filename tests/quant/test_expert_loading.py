"""Packed experts of models whose dense files keep a stack as one tensor: `import llmopt` loads single matrices."""
import json

import pytest
import torch
from compressed_tensors.compressors import unpack_from_int32
from safetensors.torch import load_file

import llmopt
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.model.loading import load_dense
from llmopt.quant import RTN
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from llmopt.specs import ModelSpec
from tests import seeing, tiny, warm
from tests.command import ROOT, command
from tests.plans import contents, dense, plan
from tests.quant.quant_data import logits

HOME = {"gpt_oss": "model.layers.1.mlp.experts", "granitemoe": "model.layers.1.block_sparse_moe.experts"}


@pytest.fixture(scope="module", params=HOME)
def saved(request, tmp_path_factory):
    """(its kind, the model in memory, its folder)"""
    model = tiny.make(request.param)
    llmopt.compress(model, [RTN(bits=3, group_size=16, overrides={"experts": {"bits": 4}})])
    return request.param, model, llmopt.save(model, tmp_path_factory.mktemp("experts") / "out")


def matrix(folder, name: str) -> torch.Tensor:
    """What a file says by compressed-tensors' arithmetic: codes times scales of groups of 16."""
    held = load_file(folder / "model.safetensors")
    codes = unpack_from_int32(held[f"{name}.weight_packed"], 4, torch.Size(held[f"{name}.weight_shape"].tolist()))
    return codes * held[f"{name}.weight_scale"].repeat_interleave(16, 1)


def test_the_matrices_of_the_file_are_gate_up_and_down_of_each_expert(saved):
    kind, model, folder = saved
    experts = model.get_submodule(HOME[kind])
    gate_up, down = experts.gate_up_proj[2], experts.down_proj[2]
    if kind == "gpt_oss":                               # columns of [in, out], gate and up in turns
        gate, up, down = gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T
    else:
        gate, up = gate_up.chunk(2)
    for name, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        assert torch.equal(matrix(folder, f"{HOME[kind]}.2.{name}"), wanted), name
    held = load_file(folder / "model.safetensors")
    assert not [name for name in held if name.endswith(("gate_up_proj", "down_proj", "_linear.weight"))]
    told = predict(tiny.make(kind), [RTN(bits=3, group_size=16, overrides={"experts": {"bits": 4}})])
    assert told.bytes == (folder / "model.safetensors").stat().st_size
    assert told.needs == ["what is written loads after `import llmopt` alone: it holds experts that dense files keep "
                          "in one tensor; format: dense loads everywhere"]
    assert not predict(tiny.make(kind), [RTN(group_size=16)], "dense").needs


def test_llmopt_loads_them_packed_or_not_and_saves_them_again(saved, tmp_path):
    _, model, folder = saved
    for packed in (False, True):
        again, _ = llmopt.load(folder, packed=packed)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5 if packed else 0)
    again, _ = llmopt.load(folder)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(llmopt.load(tmp_path / "again")[0]), logits(model))


def test_plain_transformers_refuses_them_and_says_what_is_needed(saved, tmp_path):
    _, _, folder = saved
    done = warm.run(ROOT / "tests" / "load_many.py", "plain,trust", tmp_path / "seen.pt", folder, env=command()[1])
    assert done.returncode == 0, done.stderr
    for told in torch.load(tmp_path / "seen.pt").values():
        error = told[str(folder)]["error"]
        assert "config_groups.llmopt_experts" in error and "import llmopt" in error
    refused = "refused: experts that dense files keep in one tensor"
    assert json.loads((folder / "llmopt.json").read_text())["loads_with"] == {
        "transformers": refused, "trust_remote_code": refused, "import llmopt": "exact"}
    card = (folder / "README.md").read_text()
    assert "**Its experts are packed one by one**" in card and "\nimport llmopt\n" in card


def test_they_are_no_dense_checkpoint_to_begin_from(saved):
    with pytest.raises(LlmoptError, match="out: its packed experts are not taken apart here; start from the dense"):
        load_dense(ModelSpec(id=str(saved[2]), dequantize=True))


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", pytest.param("gpt_oss", marks=pytest.mark.full),
                                  pytest.param("granitemoe", marks=pytest.mark.full)])
@pytest.mark.parametrize("more", ["", pytest.param(", ignore: [experts]", marks=pytest.mark.full)])
def test_streamed_the_bytes_are_the_same(kind, more, tmp_path):
    if kind in seeing.KINDS:
        folder = llmopt.save(seeing.make(kind), tmp_path / "dense")
    else:
        folder = dense(tmp_path, kind)
    made = plan(tmp_path, folder, f"[quant.rtn: {{bits: 4, group_size: 16{more}}}]")
    for streamed in (False, True):
        pipeline.run(made, tmp_path / str(streamed), streaming=Streaming(streamed))
    assert contents(tmp_path / "False") == contents(tmp_path / "True")
    packed = any(".experts.3.up_proj.weight_packed" in name for file in (tmp_path / "True").glob("*.safetensors")
                 for name in load_file(file))
    assert packed == (not more)


def test_a_group_that_another_tool_calls_experts_is_none_of_these(tmp_path):
    model = tiny.make("qwen3_moe")
    llmopt.compress(model, [RTN(bits=4, group_size=16)])
    folder = llmopt.save(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["config_groups"] = {"experts": groups.pop("group_0")} | groups
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(llmopt.load(folder)[0]), logits(model))
    assert load_dense(ModelSpec(id=str(folder), dequantize=True))[0].num_parameters() == model.num_parameters()
