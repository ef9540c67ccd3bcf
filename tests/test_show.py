"""`llmopt show`: any model, its bits always, what of llmopt works on it; and JSON tells what the tables do."""
import json

import pytest
from llmopt_evals.world import reference_path

import llmopt
from llmopt.checkpoint.look import checkpoint_facts, dense_facts
from llmopt.model.abilities import abilities
from llmopt.model.architectures import BESIDE_OTHERS, BOTH_ALONE, NO_ENTRY
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call


@pytest.fixture
def said(monkeypatch, capfd):
    def run(*words) -> str:
        capfd.readouterr()
        assert call(monkeypatch, *words) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize(("kind", "running", "leaves"), [
    ("lfm2", None, None), ("bloom", "none of its layers attends", None),
    ("gemma4_text", None, "tells of every layer by its number")])
def test_what_works_is_shown_of_a_model_that_no_table_knows(kind, running, leaves, said, tmp_path):
    tiny.make(kind).save_pretrained(tmp_path / "m")
    works = json.loads(said("show", tmp_path / "m", "--json"))["works"]
    assert [*works] == [*abilities("llama")] and works["quant.*"] == "yes"
    for part in ("heads.*", "kv.*", "attention.*"):
        assert running in works[part] if running else works[part] == "yes"
    assert leaves in works["blocks"] if leaves else works["blocks"] == "yes"
    other, alike = (BOTH_ALONE, BESIDE_OTHERS) if kind == "gemma4_text" else (NO_ENTRY, NO_ENTRY)
    assert works["transform.rotate"] == works["mlp"] == other and works["heads by layer"] == alike
    assert works["ffn"] == works["q_heads"] == ("yes" if kind == "gemma4_text" else NO_ENTRY)
    assert "pruning of kv_groups" in said("show", tmp_path / "m")


@pytest.mark.parametrize(("kind", "leave", "skipped"), [
    ("qwen3_moe", "yes", "yes"), ("deepseek_v3", "yes", "not these (MLA)"), ("llama4_text", "yes", "cut into chunks"),
    ("llama", None, None)])
def test_what_can_be_done_with_experts_is_shown(kind, leave, skipped, said, tmp_path):
    tiny.make(kind).save_pretrained(tmp_path / "m")
    works = json.loads(said("show", tmp_path / "m", "--json"))["works"]
    for part, expected in (("prune.experts", leave), ("experts.*", skipped)):
        assert part not in works if expected is None else expected in works[part]


def test_the_embedded_model_is_shown_by_its_name(said):
    text = said("show", "llmopt/reference")
    facts = json.loads(said("show", "llmopt/reference", "--json"))
    assert (facts["shape"]["layers"], facts["parameters"], facts["bits"]) == (6, 951_936, [16])
    assert facts["bytes"] == (reference_path() / "model.safetensors").stat().st_size
    for part in ("llama", "951,936", "bfloat16", "16, not quantized", "pruning of kv_groups"):
        assert part in text


def test_an_architecture_that_is_not_known_is_shown_and_named(said, tmp_path):
    from transformers import BitNetConfig, BitNetForCausalLM, BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "m")
    text = " ".join(said("show", tmp_path / "m").replace("│", " ").split())
    assert "weights; not run time: " in text and NO_ENTRY in text
    assert "32, not quantized" in text
    BitNetForCausalLM(BitNetConfig(**tiny.GATED)).save_pretrained(tmp_path / "b")
    assert "architecture 'bitnet' is not supported: its weights are ternary" in said("show", tmp_path / "b")


def test_bits_are_shown_whatever_they_are(said, tmp_path):
    plain, even, mixed = (tiny.make("llama") for _ in range(3))
    llmopt.compress(plain, [llmopt.kv.SnapKV(ratio=0.5)])
    llmopt.compress(even, [llmopt.quant.RTN(bits=3, group_size=32)])
    step = llmopt.quant.RTN(group_size=32, overrides={"model.layers.0.mlp.down_proj": {"bits": 2}})
    report = llmopt.compress(mixed, [step])
    for name, model, told in (("plain", plain, None), ("even", even, None), ("mixed", mixed, report)):
        llmopt.save(model, tmp_path / name, report=told)
    assert "32, not quantized" in said("show", tmp_path / "plain")
    assert "3 (21 weights)" in said("show", tmp_path / "even")
    assert "2 (1 weights), 4 (20 weights)" in said("show", tmp_path / "mixed")
    assert json.loads(said("show", tmp_path / "mixed", "--json"))["bits"] == {"2": 1, "4": 20}


def test_json_tells_the_shapes_that_the_tables_do(said, tmp_path):
    model = tiny.make("llama")
    llmopt.compress(model, [llmopt.prune.Magnitude(ratio=0.3, scope="global", units=["ffn"], refit=False)])
    llmopt.save(model, tmp_path / "m")
    facts = json.loads(said("show", tmp_path / "m", "--json"))
    assert facts["layers"] == 3
    assert facts["per_layer_config"]
    assert "layers with shapes of their own" in said("show", tmp_path / "m")


@pytest.mark.parametrize(("config", "by", "bits"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq", [4]),
    ({"quant_method": "fp8", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "fp8", [8]),
    ({"quant_method": "mxfp4"}, "mxfp4", [])])
def test_a_model_that_another_tool_has_quantized(tmp_path, config, by, bits):
    tiny.make("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    facts = dense_facts(ModelSpec(id=str(tmp_path)))
    assert (facts["quantized_by"], facts["bits"]) == (by, bits)
    assert "already quantized" in facts["note"]


def test_a_quantization_config_of_another_shape_is_one_line(tmp_path):
    llmopt.save(tiny.make("llama"), tmp_path / "m")
    file = tmp_path / "m/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"config_groups": [1]}}))
    with pytest.raises(llmopt.LlmoptError, match="quantization_config.config_groups"):
        checkpoint_facts(tmp_path / "m", json.loads((tmp_path / "m/llmopt.json").read_text()))


def test_methods_in_json_tell_what_the_table_does(said):
    told = json.loads(said("methods", "kv.snapkv", "--json"))["kv.snapkv"]
    text = said("methods", "kv.snapkv")
    assert told["fields"]["window"]["meaning"] in " ".join(text.replace("│", " ").split())
    assert set(told["fields"]["window"]) == {"takes", "default", "meaning"}
    assert told["source"].splitlines()[0] in text
