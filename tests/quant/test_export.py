import copy
import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmopt.checkpoint.compressed_tensors import export
from llmopt.errors import FieldError, LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.packing import packed
from llmopt.model.weights import check_consistent, coded
from llmopt.quant import GPTQ, RTN
from llmopt.quant.grid import Spec, round_to_nearest
from tests.quant.quant_data import batches, loaded_plain, logits
from tests.tiny import ids, make

MIXED = {"0": {"bits": 8, "group_size": -1}, "1": {"bits": 3}, "2": {"bits": 2}}


def mixed(model) -> dict:
    """Per-block settings: 8 bits per channel, then 3 and 2 bits in groups."""
    return {block.name: MIXED[str(block.index)] for block in blocks(model)}


def write(model, folder):
    """A checkpoint as the writer makes it: dense tensors replaced by packed ones, and the config."""
    packed, quantization = export(model)
    tied = set(model.all_tied_weights_keys)
    state = {k: v for k, v in model.state_dict().items() if k not in tied}
    state = {k: v.contiguous() for key, dense in state.items() for k, v in packed.get(key, {key: dense}).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": quantization, "architectures": [type(model).__name__]}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "opt", "gpt_neox"])
def test_plain_load_gives_equal_logits(kind, dtype, tmp_path):
    model = make(kind, dtype)
    before = logits(model)
    RTN(bits=4, group_size=32, overrides=mixed(model)).apply(model, Run())
    write(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), before, atol=1e-2)


def every_setting(model, turn: int) -> dict:
    """Overrides that run through bits 2..8 and, out of step, four kinds of groups, odd ones included."""
    found, kinds = RTN(group_size=-1).chosen(model), {}
    for t in found:                                         # what reads one input is written alike
        i = len(kinds)
        kinds.setdefault(t.group, {"bits": 2 + (i + turn) % 7,
                                   "group_size": (-1, 16, 32, 3 if t.columns % 3 == 0 else 1)[i % 4]})
    return {t.name: kinds[t.group] for t in found}


@pytest.mark.parametrize("shifts", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.full)])
def test_every_width_and_group_loads_in_plain_transformers(shifts, tmp_path):
    """Five layouts (split, fused, interleaved with bias, bias on q k v, post-norm), three types, negative scales."""
    saved, dtypes = {}, (torch.float32, torch.bfloat16, torch.float16)
    kinds = ("llama", "phi3", "gpt_neox", "qwen2", "olmo2")
    for turn, kind, shift in ((t, k, s) for s in shifts for t, k in enumerate(kinds)):
        model, folder = make(kind, dtypes[(turn + shift) % 3]), tmp_path / f"{kind}-{shift}"
        folder.mkdir()
        RTN(group_size=-1, overrides=every_setting(model, turn + 2 * shift)).apply(model, Run())
        write(model, folder)
        saved[str(folder)] = model
    signed, folder = make("llama", torch.float16), tmp_path / "signed"
    GPTQ(bits=2, group_size=16).apply(signed, Run(batches(2, 12)))
    assert all((weight.codes.scales < 0).any() for weight in coded(signed))
    folder.mkdir()
    write(signed, folder)
    saved[str(folder)] = signed
    for folder, plain, expected in loaded_plain(saved, tmp_path):
        assert torch.equal(plain, expected), folder


def test_a_cast_while_loading_casts_the_scales_first(tmp_path):
    """bf16 -> fp32 keeps every scale, but multiplies in fp32: the dense weight is not rounded to bf16 any more."""
    model = make("llama", torch.bfloat16)
    RTN(bits=4, group_size=16).apply(model, Run())
    write(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded(ids(1, 4))                                                # unpacks
    for weight in coded(model):
        assert torch.equal(loaded.get_parameter(weight.key), weight.codes.dequantize(torch.float32))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scale_types_stay_exact(scale_dtype, dtype, tmp_path):
    model = make("llama", dtype)
    RTN(bits=4, group_size=16, scale_dtype=scale_dtype).apply(model, Run())
    packed = write(model, tmp_path)
    stored = packed["model.layers.0.mlp.down_proj.weight"]["model.layers.0.mlp.down_proj.weight_scale"]
    assert str(stored.dtype) == f"torch.{scale_dtype}"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_config_names_every_module_and_its_bits(tmp_path):
    model = make("llama")
    record = GPTQ(bits=4, group_size=16, allocate="sensitivity", ignore=["o_proj"]).apply(model, Run(batches()))
    _, config = export(model)
    said = {name: scheme["weights"]["num_bits"] for scheme in config["config_groups"].values()
            for name in scheme["targets"]}
    assert said == {name: m["bits"] for name, m in record.meta["modules"].items()}
    assert config["quantization_status"] == "compressed" and "lm_head" in config["ignore"]
    assert "model.layers.1.self_attn.o_proj" in config["ignore"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 7), (5, 33), (1, 64)])
def test_pack_round_trip(bits, shape):
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack_to_int32(codes, bits), bits, torch.Size(shape)), codes)


def test_two_bit_words_by_hand():
    result = round_to_nearest(torch.tensor([[1.5, -1.5, 0.4, -3.0]]), Spec(2))       # s = 2: codes 1, -1, 0, -2
    assert result.scales.tolist() == [[2.0]]
    assert result.codes.tolist() == [[1, -1, 0, -2]]
    assert pack_to_int32(result.codes, 2).tolist() == [[3 + (1 << 2) + (2 << 4) + (0 << 6)]]


def test_a_later_edit_is_refused():
    model = make("llama")
    RTN(group_size=16).apply(model, Run())
    check_consistent(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(LlmoptError, match=r"layers\.1\.mlp\.up_proj: the weight was changed"):
        export(model)


def test_what_cannot_be_stored_is_refused():
    model = make("llama")
    RTN(group_size=16, symmetric=False, overrides={"mlp": {"bits": 3}}).apply(model, Run())
    with pytest.raises(LlmoptError, match="alike in bits and groups.*format: dense"):
        export(model)
    step, model = RTN(group_size=16, symmetric=False, scale_dtype="float16"), make("llama")
    with pytest.raises(FieldError, match="scale_dtype: 'float16' given, float32, the model's type"):
        predict(model, [step])
    step.apply(model, Run())
    with pytest.raises(FieldError, match="scale_dtype"):
        export(model)
    model = make("gpt2")
    RTN(group_size=16).apply(model, Run())
    with pytest.raises(LlmoptError, match="Conv1D.*format: dense"):
        export(model)
    model = make("llama")
    GPTQ(group_size=16, static_groups=False).apply(model, Run(batches()))
    check_consistent(model)
    with pytest.raises(FieldError, match="static_groups"):
        export(model)


def test_an_override_of_q_alone_is_refused():
    """By the forecast too; with k and v the same it passes, and in a dense file it may be."""
    for fields, says in (({"overrides": {"q_proj": {"bits": 8}}},
                          r"q_proj would be written at 8 bits \(int, groups of 16\), .*\.0\..*k_proj at 4 bits"),
                         ({"ignore": ["gate_proj"]}, "gate_proj would be written dense, .*up_proj at 4 bits"),
                         ({"overrides": {"up_proj": {"group_size": 32}}}, "groups of 32.*format: dense")):
        step, model = RTN(group_size=16, **fields), make("llama")
        with pytest.raises(LlmoptError, match=says):
            predict(model, [step])
        step.apply(model, Run())
        with pytest.raises(LlmoptError, match=says):
            export(model)
        predict(make("llama"), [step], "dense")
    predict(make("llama"), [RTN(group_size=16, overrides={"*[qkv]_proj": {"bits": 8}})])


def foretold(model, step) -> int:
    """Bytes of the packed tensors of a sketch on the model's shapes."""
    skeleton = copy.deepcopy(model).to("meta")
    step.sketch(skeleton, Run())
    return sum(tensor.nbytes for weight in coded(skeleton) for tensor in packed(weight).values())


def test_predicted_bytes_are_those_written():
    model = make("llama", torch.bfloat16)
    step = RTN(bits=3, group_size=32, scale_dtype="float32", overrides={"down_proj": {"bits": 8, "group_size": 48}})
    predicted = foretold(model, step)
    step.apply(model, Run())
    written, _ = export(model)
    assert predicted == sum(t.nbytes for tensors in written.values() for t in tensors.values())


@pytest.mark.parametrize("fields", [
    dict(bits=3.5, allocate="sensitivity"), dict(bits=3, allocate="lim"), dict(bits=2.6, allocate="zd", group_size=-1),
    dict(bits=3.5, allocate="sensitivity", ignore=["0.mlp"],
         overrides={"*[qkv]_proj": {"bits": 8}, "o_proj": {"bits": 16}}),
    dict(bits=7, overrides={"mlp": {"bits": 5, "group_size": -1}, "model.layers.0": {"bits": 16}})])
def test_predicted_bytes_with_allocators_are_close(fields):
    model = make("llama", hidden_size=128, intermediate_size=192, num_hidden_layers=4)
    step = RTN(**{"group_size": 16, **fields})
    predicted = foretold(model, step)
    step.apply(model, Run(batches(2, 12)))
    written = sum(t.nbytes for tensors in export(model)[0].values() for t in tensors.values())
    assert predicted == pytest.approx(written, rel=0.02 if step.allocate == "sensitivity" else 0)


def test_dense_model_exports_nothing():
    model = make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record = RTN(bits=16, group_size=16).apply(model, Run())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert export(model) is None and not coded(model) and record.meta["bits"] == 16
