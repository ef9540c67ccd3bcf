"""Damaged, foreign and missing model files: one clear line each, before torch sees them."""
import json
import resource
import shutil
from time import process_time

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.errors import LlmoptError
from llmopt.files.checks import check_folder, weight_files
from llmopt.model.loading import load_dense
from llmopt.specs import ModelSpec
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def headed(header: bytes) -> bytes:
    """A safetensors file of this header and no values."""
    return len(header).to_bytes(8, "little") + header


def edit(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_is_tiny(folder) -> None:
    model, _ = load_dense(ModelSpec(id=str(folder)))
    expected = tiny.make("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


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


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "a\0.safetensors",
                                  "pytorch_model.bin", "", "."])
def test_index_that_points_outside(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    assert "is not a file of this folder" in message(sharded)


def test_a_linked_file_is_read_wherever_it_lies(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.rename(sharded.parent / shard.name)
    shard.symlink_to(sharded.parent / shard.name)
    assert_is_tiny(sharded)
    (sharded.parent / shard.name).unlink()
    assert "which is not there" in message(sharded)


def test_the_hubs_cache_links_to_its_own_blobs(sharded):
    snapshot, blobs = sharded.parent / "snapshots" / "c0ffee", sharded.parent / "blobs"
    blobs.mkdir()
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    for shard in snapshot.glob("*.safetensors"):
        shard.rename(blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    assert_is_tiny(snapshot)


def test_the_one_file_goes_before_the_index_as_in_transformers(folder, tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "s", max_shard_size="100KB")
    for file in (tmp_path / "s").glob("model-*"):
        shutil.copy(file, folder)
    shutil.copy(tmp_path / "s" / "model.safetensors.index.json", folder)
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_damaged_values_name_their_tensor(folder, poison):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = poison
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in message(folder)


@pytest.mark.parametrize(("content", "expected"), [
    (b"\xff" * 64, "its header claims 18,446,744,073,709,551,615 bytes"),
    ((2**40).to_bytes(8, "little") + b"{}", "its header claims"),
    (bytes(8), "its header claims 0 bytes"),
    (headed(b"[" * 100_000), "header: not JSON"),
    (headed(b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON"),
    (headed(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "'a' in the safetensors header lacks"),
    (headed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'), "'a' in the safetensors"),
    (headed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 999999]}}'), "header says"),
    (headed(b"[]"), "header is not a mapping"),
])
def test_absurd_headers(folder, content, expected):
    (folder / "model.safetensors").write_bytes(content)
    assert expected in message(folder)


def test_pickled_weights_are_not_opened(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickled" in message(folder)
    assert f"A.from_pretrained({str(folder)!r}).save_pretrained(NEW)" in message(folder)
    (folder / "model.safetensors").write_bytes(weights)
    edit(folder, transformers_weights="pytorch_model.bin")
    assert "transformers_weights chooses the weight file" in message(folder)


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({!r}).touch()\n"


@pytest.mark.parametrize(("file", "changes"), [
    ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
])
def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(folder, tmp_path, file, changes):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "ran")))
    edit(folder, file, **changes)
    assert "runs only with --trust-remote-code" in message(folder)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(LlmoptError):                            # it has no class Own
        load_dense(ModelSpec(id=str(folder), trust_remote_code=True))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_fetches_no_kernel(folder, key):
    edit(folder, **{key: "kernels-community/flash-attn"})
    assert f"{key} names code of the hub" in message(folder)


@pytest.mark.parametrize(("family", "changes", "expected"), [
    ("llama", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10,000,000; at most 1,000"),
    ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000"),
    ("llama", {"num_hidden_layers": 999}, "but the weight files hold 29 tensors"),
    ("gpt2", {"n_layer": 999}, "n_layer is 999, but"),
    ("gemma3_text", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
    ("llama", {"num_hidden_layers": float("inf")}, "num_hidden_layers is inf"),
    ("llama", {"num_labels": 10**9}, "num_labels is 1,000,000,000"),
    ("llama", {"hidden_size": 10**9}, "the config wants"),
    ("llama", {"vocab_size": 10**12}, "the config wants"),
    ("llama", {"head_dim": 10**9}, "the config wants"),
    ("llama", {"intermediate_size": 10**18}, "cannot be loaded"),
    ("gpt2", {"n_positions": 10**6}, "the config wants"),
    ("mixtral", {"num_local_experts": 10**6}, "config.json wants 55,488,049,600 values"),
    ("qwen2_moe", {"num_experts": 10**6}, "the config wants"),
])
def test_a_config_of_impossible_size_costs_no_time_and_no_memory(tmp_path, family, changes, expected):
    tiny.make(family).save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", **changes)
    start, before = process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert expected in message(tmp_path / "m")
    assert process_time() - start < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # kB


def test_an_unsupported_architecture_lists_the_supported_ones(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    found = message(folder)
    assert "'t5'" in found
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
