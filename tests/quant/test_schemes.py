"""Every scheme by name: what is written is foretold to the byte, and plain transformers runs it as it was in memory."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt.checkpoint.facts import read_facts
from llmopt.checkpoint.look import checkpoint_facts
from llmopt.checkpoint.save import save
from llmopt.errors import LlmoptError
from llmopt.files.shards import written_bytes
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.forms import BYTES
from llmopt.model.loaded import forget_codes
from llmopt.model.weights import coded
from llmopt.quant import GPTQ, HQQ, RTN
from llmopt.recipe.schemes import SCHEMES
from tests.quant.quant_data import batches, loaded_plain, logits
from tests.tiny import make

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
NAMES = [name for name in SCHEMES if name[0] != "W" or name in ("W3A16", "W4A16_ASYM", "W8A8")]
WEIGHTS_ALONE = {torch.float32: "NVFP4A16", torch.float16: "MXFP8A16"}      # of models that are not bfloat16


def compressed(name: str, dtype: torch.dtype, folder):
    """A model after a step with the scheme, saved into a folder of the size that was foretold."""
    model = make("llama", dtype, **WIDE)
    solver = GPTQ if name in ("NVFP4", "FP8", "W4A16_ASYM") else RTN
    step = solver(scheme=name, **({} if SCHEMES[name].group_size != 128 or name == "FP8_BLOCK" else {"group_size": 32}))
    foretold = predict(model, [step]).bytes
    before = logits(model)
    step.apply(model, Run(batches()))
    save(model, folder)
    assert written_bytes(folder) == foretold and not torch.equal(logits(model), before)
    return model


def mixed(other: str, folder):
    """A model of one step whose down_proj have another scheme than the rest, and whose v_proj ... are as q_proj."""
    model = make("llama", torch.bfloat16, **WIDE)
    step = RTN(group_size=32, overrides={"down_proj": {"scheme": other}, "*.self_attn.[qkv]_proj": {"scheme": "W8A8"}})
    foretold = predict(model, [step]).bytes
    record = step.apply(model, Run(batches()))
    assert record.meta["modules"]["model.layers.0.mlp.down_proj"]["scheme"] == other
    save(model, folder)
    assert written_bytes(folder) == foretold
    return model


def test_overrides_of_a_scheme_make_what_two_steps_make():
    one, two = make("llama", torch.bfloat16, **WIDE), make("llama", torch.bfloat16, **WIDE)
    step = RTN(scheme="W8A8", overrides={
        "mlp": {"bits": 16}, "down_proj": {"scheme": "FP8"}, "up_proj": {"scheme": "MXFP8"},
        "gate_proj": {"scheme": "W3A16", "group_size": 32}})
    step.apply(one, Run(batches()))
    RTN(scheme="W8A8", ignore=["mlp"]).apply(two, Run())
    RTN(bits=3, group_size=32, ignore=["self_attn", "up_proj", "down_proj"]).apply(two, Run())
    RTN(scheme="MXFP8", ignore=["self_attn", "gate_proj", "down_proj"]).apply(two, Run())
    RTN(scheme="FP8", ignore=["self_attn", "gate_proj", "up_proj"]).apply(two, Run(batches()))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    told = {weight.name.rpartition(".")[2]: weight.codes for weight in coded(one)}
    assert told["down_proj"].peak > 0 and told["q_proj"].peak is None and told["gate_proj"].inputs is None
    assert step.needs_data and step.multiple == 32


def test_every_scheme_runs_in_plain_transformers(tmp_path):
    saved = {str(tmp_path / name): compressed(name, torch.bfloat16, tmp_path / name) for name in NAMES}
    saved |= {str(tmp_path / f"{name}-other"): compressed(name, dtype, tmp_path / f"{name}-other")
              for dtype, name in WEIGHTS_ALONE.items()}
    saved |= {str(tmp_path / f"mixed-{name}"): mixed(name, tmp_path / f"mixed-{name}") for name in ("FP8", "NVFP4A16")}
    told = {name: (tmp_path / name / "README.md").read_text() for name in NAMES}
    assert "What the weights read is rounded, too (4 bits, range by its values)" in told["NVFP4"]
    assert "(8 bits, range fixed)" in told["FP8"] and "rounded, too" not in told["MXFP4A16"] + told["W3A16"]
    assert "unpacks the weights while it loads them" in told["W4A16_ASYM"] and "while" not in told["NVFP4"]
    facts = checkpoint_facts(tmp_path / "W8A8", read_facts(tmp_path / "W8A8"))
    assert facts["packing"] == "int-quantized; inputs rounded: 8 bits, range by its values"
    for folder, plain, expected in loaded_plain(saved, tmp_path):
        assert (plain - expected).abs().max() <= 1e-5 * expected.abs().max(), folder


@pytest.mark.parametrize(("fields", "says"), [
    ({"scheme": "NVFP4", "bits": 3}, "bits: 3 given, 4, as scheme NVFP4 says"),
    ({"scheme": "W4A16", "symmetric": False}, "symmetric: False given, True"),
    ({"scheme": "FP8", "allocate": "lim"}, "allocate: 'lim' given, uniform"),
    ({"scheme": "MXFP4", "scale_dtype": "float16"}, "scale_dtype: 'float16' given, null"),
    ({"scheme": "FP8", "overrides": {"down_proj": {"bits": 4}}}, "overrides.down_proj.*bits: 16"),
    ({"overrides": {"down_proj": {"scheme": "FP8", "bits": 4}}}, "overrides.down_proj.bits: 4 given, 8, as scheme FP8"),
    ({"overrides": {"down_proj": {"scheme": "NVFP4", "group_size": 32}}}, "group_size: 32 given, 16, as"),
    ({"overrides": {"down_proj": {"scheme": "FP9"}}}, r"overrides.down_proj.scheme: 'FP9' given.*did you mean 'FP8'"),
    ({"scheme": "NVPF4"}, r"scheme: 'NVPF4' given, one of .*\(did you mean 'NVFP4'\?\)")])
def test_fields_that_contradict_a_scheme_are_refused_by_name(fields, says):
    with pytest.raises(LlmoptError, match=says):
        RTN(**fields)


def test_a_scheme_for_one_of_fused_weights_or_a_solver_of_integers_is_refused():
    unequal = RTN(group_size=32, overrides={"q_proj": {"scheme": "FP8_DYNAMIC"}})
    with pytest.raises(LlmoptError, match=r"q_proj would be written at 8 bits \(fp8.*rounded\), .*k_proj at 4 bits"):
        predict(make("llama", **WIDE), [unequal])
    one_rounded = RTN(bits=8, group_size=-1, overrides={"v_proj": {"scheme": "W8A8"}})
    with pytest.raises(LlmoptError, match=r"v_proj at 8 bits \(int, one scale per channel, inputs rounded\)"):
        predict(make("llama", **WIDE), [one_rounded])
    with pytest.raises(LlmoptError, match="overrides.down_proj.scheme: 'NVFP4A16' given, one of integers"):
        HQQ(overrides={"down_proj": {"scheme": "NVFP4A16"}})
    with pytest.raises(LlmoptError, match="down_proj: its 96 input features.* 128, as scheme FP8_BLOCK"):
        RTN(group_size=16, overrides={"down_proj": {"scheme": "FP8_BLOCK"}}).apply(make("llama"), Run())


def test_a_dense_file_cannot_say_that_inputs_are_rounded(tmp_path):
    model = make("llama", **WIDE)
    RTN(scheme="W8A8").apply(model, Run())
    with pytest.raises(LlmoptError, match="q_proj: format: dense cannot say that what it reads is rounded"):
        save(model, tmp_path / "out", format="dense")
    with pytest.raises(LlmoptError, match="format: dense cannot say"):
        predict(make("llama", **WIDE), [RTN(scheme="W8A8")], "dense")


def test_weights_that_read_one_input_share_a_number_and_a_range_must_be_finite():
    model = make("llama", torch.bfloat16, **WIDE)
    RTN(scheme="NVFP4").apply(model, Run(batches()))
    codes = {weight.path.rpartition(".")[2]: weight.codes for weight in coded(model)}
    assert codes["q_proj"].whole == codes["k_proj"].whole == codes["v_proj"].whole != codes["o_proj"].whole
    assert codes["gate_proj"].whole == codes["up_proj"].whole and codes["gate_proj"].peak == codes["up_proj"].peak > 0
    model = make("llama", torch.bfloat16, **WIDE)
    model.model.layers[0].input_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(LlmoptError, match="q_proj: the largest of its calibration inputs is (inf|nan).*FP8_DYNAMIC"):
        RTN(scheme="FP8").apply(model, Run(batches()))


@pytest.mark.parametrize(("schemes", "used"), [(("NVFP4", "FP8", "FP8_BLOCK", "W8A8"), True),
                                               (("MXFP4", "MXFP8A16", "NVFP4A16", "FP8_DYNAMIC"), False)])
def test_what_was_loaded_is_saved_again_to_the_byte(schemes, used, tmp_path):
    """By transformers, after `import llmopt`, and by llmopt.save, before and behind the first forward."""
    names = ("*[qkv]_proj", "o_proj", "*.mlp.[gu]*_proj", "down_proj")
    model = make("llama", torch.bfloat16, **WIDE)
    RTN(scheme=schemes[0], overrides={name: {"scheme": scheme} for name, scheme in zip(names, schemes, strict=True)}
        ).apply(model, Run(batches()))
    save(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    if used:
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "two")
    save(loaded, tmp_path / "three")
    for again in ("two", "three"):
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / again / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert torch.equal(logits(loaded), logits(model))
    forget_codes(loaded)
    forget_codes(model)
    for dense in (loaded, model):                   # the same weights, their inputs as they are
        dense.save_pretrained(tmp_path / "dense")
        bare = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.equal(logits(bare), logits(dense))
    save(model, tmp_path / "bare")


def test_what_could_not_be_read_off_stays_refused(tmp_path):
    """Such as inputs with more scales than one."""
    model = make("llama", torch.bfloat16, **WIDE)
    RTN(scheme="FP8").apply(model, Run(batches()))
    save(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.model.layers[0].self_attn.q_proj.input_scale = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(LlmoptError, match=r"q_proj: loaded in a form \(float, tensor, symmetric: True, inputs rounded"):
        save(loaded, tmp_path / "two")


def test_bytes_of_a_linear_map_beside_a_tied_head_are_no_codes_of_the_head(tmp_path):
    """As other tools write W8A16: int-quantized, which here only embeddings are."""
    model = make("llama", torch.bfloat16, **WIDE, tie_word_embeddings=True)
    RTN(bits=8, group_size=-1).apply(model, Run())
    for weight in coded(model):
        weight.codes.form = BYTES
    save(model, tmp_path / "one")
    told = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "int-quantized" and told["ignore"] == ["lm_head"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
