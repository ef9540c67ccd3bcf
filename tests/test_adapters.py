"""LoRA adapters merged on load: peft's own merged weights, streamed and whole; and adapters that do not fit."""
import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.facts import read_facts
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_model, load_tokenizer, resolve
from llmopt.specs import ModelSpec
from tests import gguf_files, tiny
from tests.command import call

PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
            "alpha_pattern": {"^model.layers.0.*q_proj": 32}}
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, words=None, **more) -> Path:
    checkpoint.save(tiny.make(family, norms=True, dtype=dtype, **more), folder, words)
    (folder / "llmopt.json").unlink()
    return folder


def adapter(folder: Path, of: Path, kind: type = LoraConfig, **settings) -> Path:
    """An adapter whose every tensor is far from what training begins with."""
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} if kind is LoraConfig else {}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(of), kind(**lora | settings))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        if "modules_to_save" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def merged(of: Path, found: Path) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(of), found).merge_and_unload().state_dict()


@pytest.mark.parametrize(("family", "more", "settings"), [
    ("llama", {}, dict(target_modules=["q_proj", "down_proj"])),
    ("llama", {}, dict(target_modules=["q_proj", "v_proj"], use_rslora=True)),
    ("llama", {}, dict(target_modules=["k_proj", "up_proj"], use_dora=True)),
    ("llama", {}, dict(target_modules=["q_proj", "up_proj"], **PATTERNS)),
    ("qwen2", UNTIED, dict(target_modules=["q_proj", "embed_tokens"])),
    ("qwen2", UNTIED, dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    ("qwen2", UNTIED, dict(target_modules=["q_proj"], bias="lora_only")),
    ("gpt2", {}, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    ("gpt2", {}, dict(target_modules=["c_proj"], use_dora=True, fan_in_fan_out=True)),
], ids=["lora", "rslora", "dora", "patterns", "embedding", "whole modules", "biases", "gpt2", "gpt2 dora"])
def test_the_weights_are_those_that_peft_merges(family, more, settings, tmp_path):
    of = base(tmp_path / "base", family, **more)
    found = adapter(tmp_path / "adapter", of, **settings)
    ours, wanted = load_model(ModelSpec(id=str(of), adapter=str(found)))[0].state_dict(), merged(of, found)
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    before = load_model(ModelSpec(id=str(of)))[0].state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in ours.items())


def test_in_bfloat16_within_a_rounding_of_pefts(tmp_path):
    of = base(tmp_path / "base", dtype=torch.bfloat16)
    found = adapter(tmp_path / "adapter", of, target_modules=["q_proj", "down_proj"])
    ours = load_model(ModelSpec(id=str(of), adapter=str(found)))[0].state_dict()
    for name, tensor in merged(of, found).items():
        assert ours[name].dtype == torch.bfloat16
        torch.testing.assert_close(ours[name].float(), tensor.float(), atol=1e-4, rtol=2 ** -7, msg=name)


def test_streamed_as_whole_and_what_is_said(tmp_path, monkeypatch, capfd):
    of = base(tmp_path / "base")
    found = adapter(tmp_path / "sum", of, target_modules=["q_proj", "down_proj"])
    words = ("compress", of, "--adapter", found, "--bits", "4", "--method", "rtn", "--no-eval", "--output")
    for folder, more in (("whole", "--no-stream"), ("streamed", "--stream")):
        assert call(monkeypatch, *words, tmp_path / folder, more) == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert one == other
    told = "the LoRA adapter sum (rank 4, 6 weights), merged into it"
    assert read_facts(tmp_path / "whole")["base_told"] == [told] and told in (
        tmp_path / "whole" / "README.md").read_text()
    capfd.readouterr()
    assert call(monkeypatch, "show", of, "--adapter", found, "--json") == 0
    assert told in capfd.readouterr().out


def test_beside_a_gguf_file_and_with_a_tokenizer_of_its_own(tmp_path):
    words = tiny.tokenizer(["the fox runs over the hill"] * 3)
    of = base(tmp_path / "base", vocab_size=len(words), words=words)
    found = adapter(tmp_path / "adapter", of, target_modules=["q_proj"])
    file = gguf_files.write(tmp_path / "m.gguf", tiny.make("llama", norms=True, vocab_size=len(words)), words)
    one, other = (load_model(ModelSpec(id=str(of), adapter=str(found)))[0].state_dict() for of in (of, file))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert load_tokenizer(resolve(ModelSpec(id=str(of), adapter=str(found)))).chat_template is None
    words.chat_template = "{{ 'told' }}"
    words.save_pretrained(found)
    torch.manual_seed(2)
    (found / "adapter_config.json").touch()         # what has changed is looked at again
    assert load_tokenizer(resolve(ModelSpec(id=str(of), adapter=str(found)))).chat_template == "{{ 'told' }}"


def changed(folder: Path, tensors: dict | None = None, **settings) -> None:
    """Other tensors (None: gone) and settings in an adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if tensors:
        stored = load_file(folder / "adapter_model.safetensors") | tensors
        save_file({key: value for key, value in stored.items() if value is not None},
                  folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.1.self_attn.q_proj"
MISFITS = {
    "no A": (dict(tensors={f"{Q}.lora_A.weight": None}), "of model.layers.1.self_attn.q_proj there is only lora_B"),
    "another rank": (dict(r=3), r"lora_A is \[4, 64\]; at rank 3 .* wants \[3, 64\]"),
    "another width": (dict(tensors={f"{Q}.lora_B.weight": torch.ones(60, 4)}), r"lora_B is \[60, 4\].* \[64, 4\]"),
    "a module that is not there": (dict(tensors={Q.replace("q_proj", "qkv") + f".lora_{s}.weight": torch.ones(4, 4)
                                                 for s in "AB"}), "changes .*qkv.weight, which .*base has not.*did"),
    "an unknown part": (dict(tensors={f"{Q}.lora_C.weight": torch.ones(4)}), "lora_C.weight is no part"),
    "DoRA without magnitudes": (dict(use_dora=True), "has no lora_magnitude_vector, and .* use_dora: True"),
    "stacks of experts": (dict(target_parameters=["mlp.experts.gate_up_proj"]), "stacks of experts cannot be merged"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_16"), "'pissa_niter_16' changes the weights of the base"),
    "another kind": (dict(peft_type="LOHA"), "of the type LOHA; LORA alone"),
    "damaged settings": (dict(r="four"), r"adapter_config.json: r is 'four'"),
    "a pattern without end": (dict(alpha_pattern={"(a+)+b" + "x" * 3: 3, r"((\w+\.?)+)+!": 2}), "takes more than"),
    "more words": (dict(tensors={"base_model.model.model.embed_tokens.weight": torch.ones(99, 64)}),
                   "one tensor for embedding and output head"),
    "no numbers": (dict(tensors={f"{Q}.lora_B.weight": torch.full((64, 4), torch.nan)}), "q_proj.weight holds .* NaN"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_one_line(misfit, tmp_path):
    of = base(tmp_path / "base")
    found = adapter(tmp_path / "adapter", of, target_modules=["q_proj"])
    change, fact = MISFITS[misfit]
    changed(found, **change)
    with pytest.raises(LlmoptError, match=fact):
        load_model(ModelSpec(id=str(of), adapter=str(found)))


def test_adapters_of_other_bases_and_kinds(tmp_path, monkeypatch, capfd):
    of, other = base(tmp_path / "base"), base(tmp_path / "other", "gpt2")
    found = adapter(tmp_path / "adapter", other, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(LlmoptError, match=f"which {of} has not.*the adapter was trained on {other}"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
    wide = base(tmp_path / "wide", vocab_size=128, **UNTIED)
    found = adapter(tmp_path / "words", wide, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(LlmoptError, match=r"lm_head.weight is \[128, 64\].*a vocabulary that was enlarged"):
        load_model(ModelSpec(id=str(base(tmp_path / "narrow", **UNTIED)), adapter=str(found)))
    found = adapter(tmp_path / "tied", of, target_modules=["q_proj", "lm_head"])
    with pytest.raises(LlmoptError, match="changes lm_head.weight, and the base has one tensor"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
    found = adapter(tmp_path / "ia3", of, IA3Config, target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(LlmoptError, match="of the type IA3; LORA alone"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
    (found / "adapter_config.json").rename(found / "config.json")
    with pytest.raises(LlmoptError, match="not an adapter: there is no adapter_config.json"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
    assert call(monkeypatch, "compress", tmp_path / "tied", "--bits", "4", "--output", tmp_path / "out") == 2
    assert f"is an adapter: give its model, and --adapter {tmp_path / 'tied'}" in capfd.readouterr().err


def test_a_pickled_or_truncated_file(tmp_path):
    of = base(tmp_path / "base")
    found = adapter(tmp_path / "adapter", of, target_modules=["q_proj"])
    file = found / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LlmoptError, match="adapter_model.safetensors: header says"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
    file.rename(found / "adapter_model.bin")
    with pytest.raises(LlmoptError, match="there is no adapter_model.safetensors; adapter_model.bin is pickled"):
        load_model(ModelSpec(id=str(of), adapter=str(found)))
