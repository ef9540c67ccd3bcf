"""Models whose weights stay packed in memory: the same logits and the same file, without dense copies."""
import gc
import json
from pathlib import Path

import peft
import psutil
import pytest
import torch
from llmopt_kernels import fixed
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmopt
from llmopt.errors import LlmoptError
from llmopt.model.computing import choose, computing
from llmopt.model.loaded import forget_codes
from llmopt.model.packed_modules import PackedEmbedding, PackedLinear
from tests import tiny

RTN = llmopt.quant.RTN
STEPS = {
    "llama": [RTN(bits=4, group_size=16, overrides={"*o_proj": {"bits": 8, "group_size": -1}})],
    "qwen2": [RTN(bits=3, group_size=-1)],                      # with biases
    "gpt_neox": [RTN(bits=5, group_size=32)],
    "mistral": [llmopt.prune.Magnitude(ratio=0.3, scope="global", units=["ffn"], refit=False),
                RTN(bits=2, group_size=16), llmopt.kv.SnapKV(ratio=0.5, window=8)],   # per-layer shapes
    "qwen3": [RTN(bits=6, group_size=32, symmetric=False)],     # whose config asks for dense weights
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes, once, a checkpoint of a family by the steps of that name."""
    root, made = tmp_path_factory.mktemp("packed"), {}

    def make(family, dtype=torch.float32, steps=None):
        key = f"{family} {dtype}"
        if steps or key not in made:
            model = tiny.make(family, dtype, norms=True)
            llmopt.compress(model, steps or STEPS[family], batches=tiny.ids(8, 32))
            made[key] = llmopt.save(model, root / f"{len(made)} {key}".replace(" ", "-"), overwrite=True)
        return made[key]

    return make


def layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize(("family", "dtype"), [
    pytest.param(family, dtype, marks=[] if (number + turn) % 2 else pytest.mark.full)
    for number, family in enumerate(STEPS) for turn, dtype in enumerate((torch.bfloat16, torch.float32))])
def test_logits_are_those_of_the_inflated_model_and_the_file_comes_out_again(family, dtype, folder, tmp_path):
    source = folder(family, dtype)
    dense, packed = llmopt.load(source)[0], llmopt.load(source, packed=True)[0]
    ids = tiny.ids()
    assert layers(packed) and not layers(dense)
    with torch.no_grad(), fixed("blocks"):
        expected, found = dense(ids).logits, packed(ids).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert packed.generate(ids[:2], max_new_tokens=4, do_sample=False).tolist() == dense.generate(
            ids[:2], max_new_tokens=4, do_sample=False).tolist()
    free = packed(ids).logits
    assert (free - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()
    packed.save_pretrained(tmp_path / "a")
    llmopt.save(packed, tmp_path / "b")
    for again in (tmp_path / "a", tmp_path / "b"):
        for name in ("model.safetensors", "config.json"):
            assert (again / name).read_bytes() == (source / name).read_bytes()
    assert len(layers(packed)) == len(layers(llmopt.load(again, packed=True)[0]))


@pytest.mark.parametrize(("family", "changes", "fields"), [
    ("llama", {}, {}), ("gemma3_text", {}, {}), ("opt", {}, {}),           # tied; one whose table scales what is read
    ("qwen2", {"tie_word_embeddings": False}, {"head": {"bits": 3}})])
def test_a_table_of_bytes_stays_packed_and_a_tied_head_shares_it(family, changes, fields, tmp_path):
    model = tiny.make(family, torch.bfloat16, **changes)
    llmopt.compress(model, [RTN(group_size=16, embedding={"bits": 8}, **fields)])
    source = llmopt.save(model, tmp_path / "a")
    dense, packed = llmopt.load(source)[0], llmopt.load(source, packed=True)[0]
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    ids = torch.cat([tiny.ids(), tiny.ids()[:, :1]], 1)
    with torch.no_grad(), fixed("blocks"):
        assert torch.equal(packed(ids).logits, dense(ids).logits)
        choose(packed, "float32", "cpu")
        with computing(packed):
            found = table(ids)
            assert found.dtype == torch.float32 and torch.equal(found, dense.get_input_embeddings()(ids))
    assert isinstance(table, PackedEmbedding) and isinstance(head, PackedLinear)
    assert (table.codes is head.codes) == (not changes)
    packed.save_pretrained(tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    forget_codes(packed)
    assert type(table) is type(dense.get_input_embeddings()) and (table.weight is head.weight) == (not changes)
    assert torch.equal(table.weight, dense.get_input_embeddings().weight)


def test_padded_rows_are_computed_as_alone(folder):
    model, ids = llmopt.load(folder("llama"), packed=True)[0], tiny.ids(2, 12)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(ids[:1, 5:], max_new_tokens=5, do_sample=False)
    assert together[0, 5:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_dense_copy_is_kept(bits, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "head_dim": 128, "vocab_size": 32}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.make("llama", dtype, **sizes)
        llmopt.compress(model, [RTN(bits=bits, group_size=128)])
        source = llmopt.save(model, tmp_path / f"{dtype}")
        packed = llmopt.load(source, packed=True)[0]
        for rows in (1, 20):
            packed(torch.ones(1, rows, dtype=torch.int64))
        held = {x.data_ptr(): x.untyped_storage().nbytes() for x in (*packed.parameters(), *packed.buffers())}
        rotary = sum(x.nbytes for name, x in packed.named_buffers() if "inv_freq" in name)
        assert sum(held.values()) - rotary <= 1.05 * (source / "model.safetensors").stat().st_size


def test_the_file_does_not_stay_mapped(folder):
    source = folder("llama", torch.bfloat16)
    mapped = {}
    for packed in (False, True):
        model = llmopt.load(source, packed=packed)[0]
        mapped[packed] = {Path(found.path) for found in psutil.Process().memory_maps()}
        del model
        gc.collect()
    assert source / "model.safetensors" in mapped[False] and source / "model.safetensors" not in mapped[True]


def test_the_environment_asks_plain_transformers(folder, tmp_path, monkeypatch):
    source = folder("llama")
    tiny.make("llama").save_pretrained(tmp_path)
    assert not layers(AutoModelForCausalLM.from_pretrained(source))
    monkeypatch.setenv("LLMOPT_PACKED", "1")
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        assert len(layers(kind.from_pretrained(source))) == 21
    assert not layers(AutoModelForCausalLM.from_pretrained(tmp_path))           # dense: nothing to keep packed
    assert not layers(llmopt.load(source, packed=False)[0])
    model = tiny.make("llama")
    llmopt.compress(model, [RTN(scheme="FP8")], batches=tiny.ids(8, 32))
    llmopt.save(model, tmp_path / "floats")                     # is verified as others read it
    with pytest.raises(LlmoptError, match="q_proj cannot stay packed: what it reads is rounded, too"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    monkeypatch.setenv("LLMOPT_PACKED", "yes")
    with pytest.raises(LlmoptError, match="LLMOPT_PACKED=yes given, 1 or 0 expected"):
        AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize(("fields", "words"), [
    ({"scheme": "NVFP4A16"}, "it holds 4-bit numbers of type float"), ({"scheme": "W8A8"}, "what it reads is rounded"),
    ({"group_size": 16, "embedding": {"bits": 4}}, "embed_tokens cannot stay packed: it is a table of less"),
    ({}, "no packed")])
def test_what_cannot_stay_packed_is_named(fields, words, tmp_path):
    model = tiny.make("llama")
    if fields:
        llmopt.compress(model, [RTN(**fields)], batches=tiny.ids(8, 32))
    llmopt.save(model, tmp_path / "a")
    with pytest.raises(LlmoptError, match=words):
        llmopt.load(tmp_path / "a", packed=True)
    assert not layers(llmopt.load(tmp_path / "a")[0])


def test_integers_in_bytes_of_their_own_stay_packed(folder, tmp_path):
    """int-quantized, as others write weights of 8 bits."""
    source = folder("llama", torch.bfloat16, [RTN(bits=8, group_size=-1)])
    packed = llmopt.load(source, packed=True)[0]
    tensors = {name: tensor for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items()
               if not name.endswith(("_packed", "_shape")) and name != "lm_head.weight"}
    tensors |= {f"{name}.weight": module.quantized().codes for name, module in packed.named_modules()
                if isinstance(module, PackedLinear)}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    for each in (config["quantization_config"], *config["quantization_config"]["config_groups"].values()):
        each["format"] = "int-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with fixed("blocks"):
        model = llmopt.load(tmp_path, packed=True)[0]
        assert torch.equal(model(tiny.ids()).logits, packed(tiny.ids()).logits)


def test_adapters_train_on_it(folder, tmp_path):
    source, ids = folder("llama"), tiny.ids()
    model = llmopt.load(source, packed=True)[0]
    twin = llmopt.load(source)[0]
    losses = []
    for each in (model, twin):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        losses.append((loss, [p.grad for p in adapted.parameters() if p.requires_grad]))
        if each is model:
            adapted.save_pretrained(tmp_path)
            with pytest.raises(LlmoptError, match="no adapter can be merged"):
                adapted.merge_and_unload()
    assert layers(model) and torch.allclose(losses[0][0], losses[1][0], rtol=1e-5)
    for mine, theirs in zip(losses[0][1], losses[1][1], strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
    back = peft.PeftModel.from_pretrained(llmopt.load(source, packed=True)[0], tmp_path)
    assert torch.allclose(back(ids).logits, model(ids).logits)


def test_a_weight_can_be_read_and_a_model_unpacked(folder, tmp_path):
    source = folder("qwen2")
    model, dense = llmopt.load(source, packed=True)[0], llmopt.load(source)[0]
    dense(tiny.ids())
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, dense.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        layer.weight.zero_()
    assert model.to(torch.bfloat16)(tiny.ids()).logits.dtype == layer.weight.dtype == torch.bfloat16
    llmopt.save(llmopt.load(source, packed=True)[0], tmp_path / "dense", format="dense")
    forget_codes(model)
    assert type(layer) is torch.nn.Linear
    for each in (model, llmopt.load(tmp_path / "dense")[0]):
        assert torch.allclose(each(tiny.ids()).logits.float(), dense(tiny.ids()).logits,
                              atol=0.2 if each is model else 1e-5)
