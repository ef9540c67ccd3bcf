"""GGUF files as models: transformers' own tensors, streamed and whole; and files that are damaged."""
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Lfm2Config,
    NemotronConfig,
    StableLmConfig,
    Starcoder2Config,
)

import llmopt
from llmopt.checkpoint.facts import read_facts
from llmopt.errors import LlmoptError
from llmopt.files.gguf_head import read_head
from llmopt.model.loading import load_model, resolve
from llmopt.model.skeleton import outlined
from llmopt.model.ways import view
from llmopt.specs import ModelSpec
from tests import gguf_files, tiny
from tests.command import llmopt as command

WORDS = tiny.tokenizer(["the fox runs over the hill and far away"] * 3)
SIZES = dict(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(**SIZES, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=256)
MORE = {"bloom": BloomConfig(vocab_size=len(WORDS), hidden_size=64, n_layer=2, n_head=4),
        "falcon": FalconConfig(**SIZES, new_decoder_architecture=False), "starcoder2": Starcoder2Config(**GROUPED),
        "stablelm": StableLmConfig(**GROUPED), "nemotron": NemotronConfig(**GROUPED),
        "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)}
TOLD = {            # sizes that a file of this architecture does not tell; transformers takes its config's defaults
    "qwen3": dict(head_dim=128), "gpt2": dict(n_positions=1024, n_inner=None),
    "qwen3_moe": dict(moe_intermediate_size=768)}
ALL = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2", "qwen3_moe", *MORE)
FEW = ("gpt2", "qwen3_moe", "lfm2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def model_of(family: str) -> torch.nn.Module:
    if family not in MORE:
        return tiny.make(family, norms=True, vocab_size=len(WORDS), **TOLD.get(family, {}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MORE[family], dtype=torch.float32)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in ALL])
def test_tensors_are_those_that_transformers_makes(family, tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of(family), None if "gemma" in family else WORDS, kind="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours, _ = load_model(ModelSpec(id=str(file)))
    assert type(ours) is type(theirs) and equal(ours.state_dict(), theirs.state_dict())
    assert ours.config.dtype == torch.float32 and getattr(ours, "hf_quantizer", None) is None


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16),
                                             ("Q4_0", torch.float32), ("Q5_1", torch.float32)])
def test_a_llama_comes_back_as_it_was_before_its_matrices_were_rounded(kind, dtype, tmp_path):
    model = model_of("llama")
    file = gguf_files.write(tmp_path / "m.gguf", model, WORDS, kind=kind)
    found, words = llmopt.load(file)
    assert found.config.dtype == found.model.layers[0].mlp.up_proj.weight.dtype == dtype
    off = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q4_0": 0.15, "Q5_1": 0.05}[kind]
    for name, tensor in model.state_dict().items():
        assert (found.state_dict()[name].float() - tensor).abs().max() <= off * tensor.abs().max(), name
    assert words("the fox, far").input_ids == WORDS("the fox, far").input_ids and len(words) == len(WORDS)
    assert words.chat_template and words.eos_token == "</s>"


def test_a_tokenizer_gets_no_token_for_which_the_model_has_no_row(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS)
    assert len(AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")) == len(WORDS) + 1       # <|endoftext|>
    assert len(load_model(ModelSpec(id=str(file)))[1]) == len(WORDS)


def test_streamed_as_whole_and_the_card_tells_of_the_file(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS, kind="Q8_0", general__license="mit",
                            general__base_model__0__repo_url="https://huggingface.co/some/Model")
    words = ["compress", file, "--bits", 4, "--method", "rtn", "--no-eval", "--output"]
    for folder, more in (("whole", "--no-stream"), ("streamed", "--stream")):
        assert command(*words, tmp_path / folder, more).returncode == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert one == other
    facts, card = read_facts(tmp_path / "whole"), (tmp_path / "whole" / "README.md").read_text()
    assert facts["base_ancestor"] == "some/Model" and facts["base_licence"] == "mit"
    assert "the GGUF file m.gguf" in card and "22 Q8_0, 7 F32), which was quantized already." in card
    assert "base_model: some/Model" in card
    assert "22 Q8_0" in command("show", tmp_path / "whole").stdout.replace("\n", " ")


def test_one_tensor_is_made_at_a_time(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("qwen3_moe"), WORDS, kind="Q8_0")
    spec = ModelSpec(id=str(file))
    _, places = outlined(spec.at(resolve(spec)))
    made = places["model.layers.1.mlp.experts.gate_up_proj"]
    assert made.shape == (4, 1536, 64) and made.file == file
    assert torch.equal(made.make(), load_model(spec)[0].model.layers[1].mlp.experts.gate_up_proj)


def test_a_folder_with_one_file_or_with_the_name_of_one(tmp_path):
    (tmp_path / "m").mkdir()
    gguf_files.write(tmp_path / "m" / "a.gguf", model_of("llama"), WORDS)
    assert view.of(resolve(str(tmp_path / "m"))).weights.endswith("a.gguf")
    gguf_files.write(tmp_path / "m" / "b.gguf", tiny.make("llama", seed=1, vocab_size=len(WORDS)), WORDS)
    with pytest.raises(LlmoptError, match="2 GGUF files.*a.gguf, b.gguf"):
        resolve(str(tmp_path / "m"))
    one, other = (load_model(ModelSpec(id=str(tmp_path / "m"), gguf_file=name))[0].state_dict()
                  for name in ("a.gguf", "b.gguf"))
    assert not equal(one, other)
    with pytest.raises(LlmoptError, match="no file 'c.gguf'"):
        resolve(ModelSpec(id=str(tmp_path / "m"), gguf_file="c.gguf"))
    told = command("compress", tmp_path / "m", "--gguf-file", "b.gguf", "--bits", 4, "--method", "rtn", "--no-eval",
                   "--output", tmp_path / "out")
    assert told.returncode == 0 and "gguf_file: b.gguf" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_file_that_has_changed_is_read_again(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS)
    first = resolve(str(file))
    gguf_files.write(file, model_of("qwen2"), WORDS)
    assert resolve(str(file)) != first and load_model(ModelSpec(id=str(file)))[0].config.model_type == "qwen2"


def test_no_other_folder_can_say_where_its_weights_lie(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS)
    shutil.copytree(resolve(str(file)), tmp_path / "elsewhere")
    assert view.of(tmp_path / "elsewhere") is None
    with pytest.raises(LlmoptError, match="no model.safetensors"):
        load_model(ModelSpec(id=str(tmp_path / "elsewhere")))


def test_without_a_tokenizer_it_is_compressed_and_says_so(tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"))
    told = command("compress", file, "--bits", 4, "--method", "rtn", "--no-eval", "--output", tmp_path / "out")
    assert told.returncode == 0 and "holds no tokenizer" in told.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def changed(file: Path, old: bytes, new: bytes) -> Path:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    return file


def type_number(file: Path, name: str, number: int) -> Path:
    """The file with another type for a tensor, which stands behind its name and two dimensions."""
    content = file.read_bytes()
    place = content.index(name.encode()) + len(name) + 4 + 16
    file.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4:])
    return file


DAMAGES = {
    "cut off in its values": (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "ends at byte .* was cut off"),
    "cut off in its head": (lambda f: f.write_bytes(f.read_bytes()[:2000]), "goes on behind the end"),
    "empty": (lambda f: f.write_bytes(b""), "empty"),
    "no GGUF": (lambda f: f.write_bytes(b"{}" * 100), "not a GGUF file"),
    "of a newer version": (lambda f: changed(f, b"GGUF\x03", b"GGUF\x07"), "version 7"),
    "big-endian": (lambda f: changed(f, b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), "big-endian"),
    "of an unknown architecture": (lambda f: changed(f, b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lluma"),
                                   "architecture 'lluma'.*did you mean 'llama'"),
    "of a type without numbers": (lambda f: type_number(f, "token_embd.weight", 24), "type I8, which cannot be deq"),
    "of a type nobody knows": (lambda f: type_number(f, "token_embd.weight", 99), "type 99"),
    "of a billion layers": (lambda f: changed(f, b"llama.block_count\4\0\0\0\3\0\0\0",
                                              b"llama.block_count\4\0\0\0\0\0\0\x40"), "block_count is 1073741824"),
    "of other sizes": (lambda f: changed(f, b"llama.feed_forward_length\4\0\0\0\x60", b"llama.feed_forward_length"
                                         b"\4\0\0\0\x50"), "the config wants"),
    "without a tensor": (lambda f: changed(f, b"blk.1.ffn_up", b"blk.1.ffn_ap"), "1 tensors missing.*1.mlp.up_proj"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(damage, tmp_path):
    act, fact = DAMAGES[damage]
    file = gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS)
    act(file)
    with pytest.raises(LlmoptError, match=fact) as caught:
        load_model(ModelSpec(id=str(file)))
    assert "m.gguf" in str(caught.value)
    assert not list((tmp_path / "cache").rglob(".m.gguf*"))


def test_one_of_several_parts_and_values_that_are_no_numbers(tmp_path):
    model = model_of("llama")
    file = gguf_files.write(tmp_path / "m-00001-of-00003.gguf", model, WORDS)
    with pytest.raises(LlmoptError, match="one of 3 parts.*llama-gguf-split --merge"):
        resolve(str(file))
    model.model.norm.weight.data[3] = torch.nan
    file = gguf_files.write(tmp_path / "m.gguf", model, WORDS)
    with pytest.raises(LlmoptError, match="model.norm.weight holds 1 NaN"):
        load_model(ModelSpec(id=str(file)))
    told = command("compress", file, "--bits", 4, "--method", "rtn", "--stream", "--no-eval", "--output",
                   tmp_path / "out")
    assert told.returncode == 2 and "NaN" in told.stderr and not (tmp_path / "out").exists()


def test_the_head_is_read_without_the_values(tmp_path):
    head = read_head(gguf_files.write(tmp_path / "m.gguf", model_of("llama"), WORDS, kind="Q4_0"))
    assert head.architecture == "llama" and head.types()["Q4_0"] == 22 and head.facts["tokenizer.ggml.tokens"] == len(
        WORDS)
    assert next(t.shape for t in head.tensors if t.name == "blk.0.ffn_up.weight") == (96, 64)
