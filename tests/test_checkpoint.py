"""Checkpoints as strangers load them: every row of the table of how portable each content is, in a fresh process."""
import errno
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import llmopt
from llmopt.checkpoint.place import prepare_output
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.model import state
from llmopt.runtime.attach import detach
from tests import tiny, warm
from tests.command import ROOT, command

RTN = llmopt.get("quant.rtn")
PRUNE = functools.partial(llmopt.get("prune.magnitude"), refit=False)
SNAPKV = llmopt.get("kv.snapkv")
A_SHAPE = llmopt.get("attention.a_shape")
MIXED = {"*o_proj": {"bits": 8}, "*down_proj": {"bits": 3}}

CASES = {
    "quant-llama": ("llama", [RTN(bits=4, group_size=32, overrides=MIXED)]),
    "quant-phi3": ("phi3", [RTN(bits=5, group_size=-1)]),
    "quant-gpt_neox": ("gpt_neox", [RTN(bits=4, group_size=32)]),
    "uniform-qwen3": ("qwen3", [PRUNE(ratio=0.3, scope="local", units=["ffn"])]),
    "uniform-heads-llama": ("llama", [PRUNE(ratio=0.5, scope="local", units=["kv_groups"])]),
    "blocks-mistral": ("mistral", [PRUNE(ratio=0.34, scope="global", units=["blocks"])]),
    "per_layer-llama": ("llama", [PRUNE(ratio=0.3, scope="global", units=["ffn", "kv_groups"])]),
    "per_layer-qwen3-quant": ("qwen3", [PRUNE(ratio=0.3, scope="global", units=["ffn"]), RTN(bits=4, group_size=16)]),
    "kv-llama": ("llama", [SNAPKV(ratio=0.5, window=8)]),
    "attention-mistral": ("mistral", [A_SHAPE(sinks=2, window=8, min_length=0)]),
    "everything-llama": ("llama", [PRUNE(ratio=0.12, scope="global", units=["ffn"]), RTN(bits=4, group_size=16),
                                   A_SHAPE(sinks=2, window=8, min_length=0), SNAPKV(ratio=0.5, window=8)]),
}
GPTQ = llmopt.get("quant.gptq")
PLANS = {"uniform": {"units": ["ffn", "kv_groups"], "ratio": 0.5}, "per_layer": {"scope": "global", "ratio": 0.3},
         "per_layer-parts": {"units": ["attention", "mlp"], "ratio": 0.3},
         "blocks": {"units": ["blocks"], "ratio": 0.34}}
FULL = {f"{plan}-{family}-gptq": (family, [PRUNE(**{"units": ["ffn"]} | fields), GPTQ(bits=4, group_size=8)])
        for plan, fields in PLANS.items() for family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")
        if plan != "uniform" or family != "gpt_neox"}
PER_LAYER = {name for name in CASES | FULL if name.startswith(("per_layer", "everything"))}
LIVE = {"kv-llama", "attention-mistral", "everything-llama"}


@dataclass
class Made:
    folders: dict[str, Path]
    memory: dict[str, dict[str, torch.Tensor]]      # the model in memory, with its runtime parts
    dense: dict[str, dict[str, torch.Tensor]]       # the same weights without them


def names(wanted) -> list:
    """In order; those that the full tier alone makes are marked."""
    return [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in sorted(wanted)]


def look(model) -> dict[str, torch.Tensor]:
    """What tests/load_many.py keeps."""
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return {"logits": model(ids).logits,
                "tokens": model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, request) -> Made:
    result = Made({}, {}, {})
    for name, (family, steps) in (CASES | (FULL if request.config.getoption("--full") else {})).items():
        model = tiny.make(family)
        report = llmopt.compress(model, steps, batches=tiny.ids(8, 32))
        result.folders[name] = llmopt.save(model, tmp_path_factory.mktemp("saved") / name, report=report)
        result.memory[name] = look(model)
        detach(model)
        result.dense[name] = look(model)
    return result


def loaded(how: str, made: Made, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp(how) / "results.pt"
    done = warm.run(ROOT / "tests" / "load_many.py", how, out, *made.folders.values(), env=command()[1])
    assert done.returncode == 0, done.stderr
    results = torch.load(out)[how]
    return {name: results[str(folder)] for name, folder in made.folders.items()}


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    return loaded("plain", made, tmp_path_factory)


@pytest.fixture(scope="module")
def trust(made, tmp_path_factory):
    return loaded("trust", made, tmp_path_factory)


@pytest.fixture(scope="module")
def imported(made, tmp_path_factory):
    return loaded("import", made, tmp_path_factory)


def assert_same(found: dict, expected: dict) -> None:
    assert "error" not in found, found["error"]
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert found["tokens"].tolist() == expected["tokens"].tolist()


@pytest.mark.parametrize("name", names(CASES | FULL))
def test_after_import_everything_is_exact(name, made, imported):
    assert_same(imported[name], made.memory[name])


@pytest.mark.parametrize("name", names(CASES | FULL))
def test_remote_code_alone_gives_the_exact_weights(name, made, trust):
    assert_same(trust[name], made.dense[name])


@pytest.mark.parametrize("name", names(set(CASES | FULL) - PER_LAYER))
def test_plain_transformers_gives_the_exact_weights(name, made, plain):
    assert_same(plain[name], made.dense[name])


@pytest.mark.parametrize("name", names(PER_LAYER))
def test_plain_transformers_refuses_per_layer_shapes_loudly(name, made, plain):
    assert "per_layer_config" in json.loads((made.folders[name] / "config.json").read_text())
    assert "error" in plain[name]


@pytest.mark.parametrize("name", sorted(LIVE))
def test_runtime_parts_change_the_text(name, made):
    assert made.memory[name]["tokens"].tolist() != made.dense[name]["tokens"].tolist()


def test_dense_format_writes_the_rounded_weights(tmp_path):
    model = tiny.make("gpt2")
    llmopt.compress(model, [RTN(bits=3, group_size=32)])
    with pytest.raises(LlmoptError, match="format: dense"):
        llmopt.save(model, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()
    folder = llmopt.save(model, tmp_path / "dense", format="dense")
    fresh, _ = llmopt.load(folder)
    assert torch.equal(fresh(tiny.ids()).logits, model(tiny.ids()).logits)


def test_a_weight_changed_after_quantization_is_not_saved(tmp_path):
    model = tiny.make("llama")
    llmopt.compress(model, [RTN(bits=4, group_size=32)])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(LlmoptError, match=r"model\.layers\.1\.mlp\.up_proj"):
        llmopt.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_output_in_use_is_refused_and_overwritten_on_request(tmp_path):
    model = tiny.make("llama")
    llmopt.save(model, tmp_path / "out")
    with pytest.raises(LlmoptError, match="--overwrite"):
        llmopt.save(model, tmp_path / "out")
    llmopt.compress(model, [RTN(bits=4, group_size=32)])
    llmopt.save(model, tmp_path / "out", overwrite=True)
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(LlmoptError, match="not a checkpoint"):
        llmopt.save(tiny.make("llama"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_output_inside_the_models_folder_is_refused(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    for inside in (tmp_path / "m", tmp_path / "m" / "out"):
        with pytest.raises(LlmoptError, match="inside the model's folder"):
            prepare_output(inside, str(tmp_path / "m"), overwrite=True)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing(tmp_path, monkeypatch, failure):
    def fail(*args):
        raise failure

    monkeypatch.setattr(shards, "sync", fail)
    with pytest.raises((LlmoptError, KeyboardInterrupt)) as caught:
        llmopt.save(tiny.make("llama"), tmp_path / "out")
    assert isinstance(caught.value, KeyboardInterrupt) or "disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_reloads_differently_is_refused(tmp_path, monkeypatch):
    real = shards.write

    def damaged(folder, tensors, size):
        name = "model.layers.0.mlp.up_proj.weight"
        real(folder, tensors | {name: tensors[name] * 1.01}, size)

    monkeypatch.setattr(shards, "write", damaged)
    with pytest.raises(llmopt.VerificationError, match="logits differ"):
        llmopt.save(tiny.make("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards_close_at_block_boundaries_and_sizes_are_known(tmp_path):
    model = tiny.make("qwen3")
    folder = llmopt.save(model, tmp_path / "out", max_shard_size="150KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in range(3):
        assert len({shard for name, shard in index.items() if f".layers.{layer}." in name}) == 1
    assert len(set(index.values())) > 1
    single = llmopt.save(model, tmp_path / "single")
    assert shards.file_bytes(state.plain_state(model)) == (single / "model.safetensors").stat().st_size


def test_two_saves_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        model = tiny.make("llama")
        report = llmopt.compress(model, [RTN(bits=4, group_size=32)])
        llmopt.save(model, tmp_path / name / "out", report=report)
    a, b = (sorted((tmp_path / n / "out").iterdir()) for n in ("a", "b"))
    assert [p.name for p in a] == [p.name for p in b]
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(a, b, strict=True))
