"""`save_pretrained` of a compressed model: what `llmopt.save` writes, whoever calls it and however the model came."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmopt
from llmopt.errors import LlmoptError
from llmopt.model.loaded import forget_codes
from llmopt.runtime.attach import detach
from tests import tiny

RTN, SNAPKV, PRUNE = llmopt.quant.RTN, llmopt.kv.SnapKV, llmopt.prune.Magnitude
STEPS = {
    "quant": [RTN(bits=4, group_size=16, overrides={"*o_proj": {"bits": 8, "group_size": -1}})],
    "runtime": [SNAPKV(ratio=0.5, window=8)],
    "per layer": [PRUNE(ratio=0.3, scope="global", units=["ffn"], refit=False), RTN(bits=3, group_size=16),
                  SNAPKV(ratio=0.5, window=8)],
}


def stock(dtype=torch.bfloat16):
    """A tiny model of the very class of transformers, as it comes from code that has not heard of llmopt."""
    like = tiny.make("llama", dtype)
    made = LlamaForCausalLM._from_config(like.config, dtype=dtype).eval()
    made.load_state_dict(like.state_dict())
    return made


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", STEPS)
def test_it_writes_what_llmopt_save_writes(name, tmp_path):
    model = stock()
    llmopt.compress(model, STEPS[name], batches=tiny.ids(8, 32))
    llmopt.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "a")
    assert isinstance(model, LlamaForCausalLM)
    assert weights(tmp_path / "a") == weights(tmp_path / "saved")
    for used, kind in ((False, AutoModelForCausalLM), (True, AutoModelForCausalLM), (True, LlamaForCausalLM)):
        loaded = kind.from_pretrained(tmp_path / "a")       # transformers unpacks weights at the first forward
        if used:
            loaded(tiny.ids())
        loaded.save_pretrained(tmp_path / "b")
        assert weights(tmp_path / "b") == weights(tmp_path / "saved")
        assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()
        if used:
            assert torch.equal(loaded(tiny.ids()).logits, model(tiny.ids()).logits)


def test_other_files_of_the_folder_stay_and_old_shards_go(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    (tmp_path / "optimizer.pt").write_text("state")
    (tmp_path / "README.md").write_text("mine")
    llmopt.compress(model, STEPS["quant"])
    model.save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict(), max_shard_size=10**9)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "llmopt.json", "optimizer.pt", "README.md", "model.safetensors"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_cannot_be_served_is_refused(tmp_path):
    model = stock()
    llmopt.compress(model, STEPS["quant"])
    foreign = model.state_dict() | {"model.norm.weight": torch.zeros(64)}
    for options, words in (({"state_dict": foreign}, "model.norm.weight is not the model's own"),
                           ({"push_to_hub": True}, "llmopt push"), ({"variant": "fp16"}, "variant")):
        with pytest.raises(LlmoptError, match=words):
            model.save_pretrained(tmp_path, **options)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(LlmoptError, match="forget_codes"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_after_detach_nothing_of_the_methods_is_written(tmp_path):
    model = stock()
    llmopt.compress(model, STEPS["runtime"])
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for each in (model, loaded):
        detach(each)
        each.save_pretrained(tmp_path / "b")
        assert not {"llmopt", "auto_map"} & json.loads((tmp_path / "b" / "config.json").read_text()).keys()


def test_a_model_that_forgot_its_codes_is_an_ordinary_one(tmp_path):
    model = stock()
    llmopt.compress(model, STEPS["quant"])
    model.save_pretrained(tmp_path / "a")
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        forget_codes(each)
        each.model.layers[0].mlp.up_proj.weight.data += 1
        each.save_pretrained(tmp_path / "b")
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
        assert torch.equal(fresh(tiny.ids()).logits, each(tiny.ids()).logits)


def test_a_try_out_leaves_the_class_as_it_was():
    model = stock()
    with llmopt.attached(model, SNAPKV(budget=16, window=8)):
        assert type(model) is not LlamaForCausalLM
    assert type(model) is LlamaForCausalLM
