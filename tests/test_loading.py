"""Damaged, foreign and missing model files: one clear line each, before torch sees them."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.folder import check_folder
from llmopt.loading import load_dense
from llmopt.method import LlmoptError
from llmopt.recipe import ModelSpec
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def message(folder) -> str:
    with pytest.raises(LlmoptError) as caught:
        load_dense(ModelSpec(id=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_loads(folder):
    model, tokenizer = load_dense(ModelSpec(id=str(folder)))
    assert tokenizer is None
    assert torch.equal(model(tiny.ids()).logits, tiny.make("llama")(tiny.ids()).logits)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in message(folder)


def test_no_folder(tmp_path):
    assert "not a model folder" in message(tmp_path / "nothing")


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    found = message(folder)
    assert "model.safetensors" in found
    assert "cut off" in found


def test_missing_shard(sharded):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in message(sharded)


def test_index_that_points_outside(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../etc/passwd.safetensors")
    index.write_text(json.dumps(content))
    assert "is not a file of this folder" in message(sharded)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_damaged_values_name_their_tensor(folder, poison):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = poison
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in message(folder)


def test_absurd_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "not a safetensors file" in message(folder)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickled" in message(folder)


def test_an_unsupported_architecture_lists_the_supported_ones(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))
    found = message(folder)
    assert "'bloom'" in found
    assert "gpt_neox" in found


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.2.self_attn.k_proj.weight" in message(folder)


def test_a_foreign_tokenizer_is_refused(folder):
    from llmopt_evals.world.tokenizer import save_tokenizer

    save_tokenizer(folder)
    assert "belong to different models" in message(folder)


def test_check_folder_reads_no_weights(folder, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", None)
    check_folder(folder)
    shutil.rmtree(folder)
    with pytest.raises(LlmoptError):
        check_folder(folder)
