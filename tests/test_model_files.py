"""Model folders whose tensors do not say what the config says: refused by name, or read as transformers reads them."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmopt
from llmopt.calibration import data
from llmopt.errors import LlmoptError
from llmopt.model import loading
from llmopt.model.skeleton import open_model
from llmopt.recipe.reader import Recipe
from llmopt.run.opening import Streaming
from llmopt.run.pipeline import run
from llmopt.specs import DataSpec, ModelSpec
from tests import tiny

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def refill(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusals(folder, **spec) -> list[str]:
    """What the two ways of opening a model say against it."""
    said = []
    for load in (loading.load_dense, open_model):
        with pytest.raises(LlmoptError) as caught:
            load(ModelSpec(id=str(folder), **spec))
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize(("name", "words"), [
    (f"{QUERY}.bias", "bias that a flag"), (f"{QUERY}.weight_scale_inv", "are quantized"),
    (f"{QUERY}.lora_A", "merge the adapter"), ("model.adapter", "does not fit its config")])
def test_a_tensor_without_a_place_is_refused_by_name(folder, name, words):
    refill(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    for said in refusals(folder):
        assert name in said and words in said


def test_buffers_of_old_versions_do_no_harm(folder):
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias", "h.0.attn.masked_bias",
             "model.embed.position_ids")
    refill(folder, lambda tensors: tensors.update({name: torch.ones(4, dtype=torch.uint8) for name in names}))
    model, _ = loading.load_dense(ModelSpec(id=str(folder)))
    assert torch.equal(model(tiny.ids()).logits, tiny.make("llama")(tiny.ids()).logits)
    open_model(ModelSpec(id=str(folder)))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int32, "I32"), (torch.bool, "BOOL"), (torch.complex64, "C64"),
                                             (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_no_floats_are_refused(folder, dtype, kind):
    refill(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    for said in refusals(folder):
        assert f"{NORM} holds {kind}" in said


def test_what_float16_cannot_hold_is_said_so(folder):
    refill(folder, lambda tensors: tensors[NORM].fill_(70000.0))
    with pytest.raises(LlmoptError, match=r"model\.norm\.weight reaches 7e\+04, and float16 ends at 65504"):
        loading.load_dense(ModelSpec(id=str(folder), dtype="float16"))
    with pytest.raises(LlmoptError, match="float16 ends"):
        run(Recipe(model=ModelSpec(id=str(folder), dtype="float16")), folder.parent / "out",
            streaming=Streaming(force=True))
    loading.load_dense(ModelSpec(id=str(folder), dtype="bfloat16"))


HEADS = {"the head alone": lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
         "another head": lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}),
         "the same twice": lambda t: t.update({HEAD: t[EMBEDDING].clone()})}


@pytest.mark.parametrize("kind", HEADS)
def test_memory_and_stream_tie_heads_as_the_files_do(folder, kind):
    refill(folder, HEADS[kind])
    expected = AutoModelForCausalLM.from_pretrained(folder)(tiny.ids()).logits
    made = {}
    for stream in (False, True):
        out = folder.parent / f"out{stream}"
        run(Recipe(model=ModelSpec(id=str(folder))), out, streaming=Streaming(force=stream))
        made[stream] = (out / "model.safetensors").read_bytes(), (out / "config.json").read_text()
        assert json.loads(made[stream][1])["tie_word_embeddings"] is (kind != "another head")
        assert torch.equal(LlamaForCausalLM.from_pretrained(out)(tiny.ids()).logits, expected)
    assert made[False] == made[True]


def test_a_head_tied_by_hand_is_saved_as_tied(tmp_path):
    model = tiny.make("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    llmopt.save(model, tmp_path / "out")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh(tiny.ids()).logits, model(tiny.ids()).logits)


class Tokenizer:
    """As many tokens as it is told, the last of which were added later."""

    def __init__(self, size: int, added: int):
        self.size, self.added_tokens_decoder = size, {index: f"[T{index}]" for index in range(size - added, size)}

    def __len__(self) -> int:
        return self.size


def test_tokens_without_rows_are_named(folder, monkeypatch):
    model = tiny.make("llama")                          # 96 rows
    for size, added, words in ((97, 1, r"'\[T96\]' was added to the tokenizer alone"), (97, 0, "different models")):
        tokenizer = Tokenizer(size, added)
        monkeypatch.setattr(loading, "load_tokenizer", lambda *a, made=tokenizer: made)
        with pytest.raises(LlmoptError, match=words):
            loading.fitting_tokenizer(model, str(folder), ModelSpec())


def test_a_sentencepiece_file_asks_for_its_packages(folder, monkeypatch):
    (folder / "tokenizer.model").write_bytes(b"\n\x05")
    monkeypatch.setattr(loading, "is_installed", lambda module: module != "sentencepiece")
    with pytest.raises(LlmoptError, match="pip install sentencepiece"):
        loading.load_tokenizer(str(folder))


def test_a_home_is_found_behind_the_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ids().tolist()))
    loading.load_dense(ModelSpec(id="~/m"))
    assert len(data.load(DataSpec(name="ids", path="~/ids.jsonl"), tiny.make("llama").config, None)) == 1


def test_one_dict_is_one_batch():
    ids = tiny.ids()
    (batch,) = data.as_batches({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 96)
    assert batch["input_ids"] is ids
    assert len(data.as_batches(iter([{"input_ids": ids}, {"input_ids": ids}]), 96)) == 2
    for wrong in ({"input_ids": ids.tolist()}, {"input_ids": ids[0]}, {"attention_mask": ids},
                  {"input_ids": ids.float()}, {"input_ids": ids, "attention_mask": torch.ones(2, 3)}, 5, "text",
                  ids.float(), [ids], [1, 2], [["a"]]):
        with pytest.raises(LlmoptError, match="input_ids"):
            data.as_batches(wrong, 96)


def test_steps_and_models_of_other_kinds_are_named():
    model = tiny.make("llama")
    for wrong, given in ((model, [5]), (model, [str]), ("m", [])):
        with pytest.raises(LlmoptError, match="expected"):
            llmopt.compress(wrong, given)
    assert llmopt.compress(model, llmopt.quant.RTN(bits=8, group_size=16)).records
