"""What the Python interface promises around a call: errors, and the model after one."""
import copy

import pytest
import torch

import llmopt
from llmopt.attention import AShape
from llmopt.checkpoint.facts import read_facts
from llmopt.errors import LlmoptError
from llmopt.kv import SnapKV
from llmopt.quant import RTN
from tests import tiny


def test_bad_input_is_a_value_error():
    for wrong in (lambda: RTN(bits=9), lambda: RTN(bit=4), lambda: llmopt.get("quant.rnt"),
                  lambda: llmopt.load("/none")):
        with pytest.raises(ValueError, match=r"bits|quant\.rtn|none"):
            wrong()


def interrupting(items, label):
    """A progress that is interrupted at the second block."""
    for index, item in enumerate(items):
        if index:
            raise KeyboardInterrupt
        yield item


def test_a_model_left_half_edited_refuses_by_name(tmp_path):
    model = tiny.make("llama")
    with pytest.raises(KeyboardInterrupt):
        llmopt.compress(model, [RTN(group_size=16)], progress=interrupting)
    for use in (lambda: model(tiny.ids()), lambda: model.generate(tiny.ids(), max_new_tokens=2),
                lambda: llmopt.save(model, tmp_path / "a"), lambda: model.save_pretrained(tmp_path / "b"),
                lambda: llmopt.compress(model, [RTN()]), lambda: copy.deepcopy(model)(tiny.ids())):
        with pytest.raises(LlmoptError, match="half-edited; load it again"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_step_has_edited_is_as_it_was():
    model = tiny.make("llama")
    before = model(tiny.ids()).logits
    for steps in ([RTN(group_size=48)], [AShape(min_length=0), SnapKV(ratio=0.5, allocate="heads", heads="none.json")]):
        with pytest.raises(LlmoptError):
            llmopt.compress(model, steps, progress=interrupting)
        assert torch.equal(model(tiny.ids()).logits, before)
    llmopt.compress(model, [RTN(group_size=16)])
    assert model(tiny.ids()).logits.isfinite().all()


def test_run_does_what_the_command_does(tmp_path):
    recipe = {"steps": [{"quant.rtn": {}}], "eval": {"tasks": ["world_ppl"], "limit": 2}}
    report = llmopt.run(recipe, tmp_path / "out")
    facts = read_facts(tmp_path / "out")
    assert report.scores == facts["scores"] and report.scores["before"] != report.scores["after"]
    assert report.size == facts["bytes"] == facts["predicted_bytes"]
    assert "world_ppl word_perplexity" in str(report)
    with pytest.raises(LlmoptError, match="overwrite=True"):
        llmopt.run(recipe, tmp_path / "out")
    again = llmopt.run(recipe, tmp_path / "out", resume=True)           # finished: nothing is left to do
    assert (again.scores, again.to_dict()) == (report.scores, report.to_dict())
    ppl = llmopt.evaluate(report.model, "world_ppl", report.tokenizer, limit=2)["world_ppl"]["word_perplexity"]
    assert ppl == pytest.approx(report.scores["after"][0][2])


def test_the_recipe_of_a_checkpoint_names_its_data_or_there_is_none(tmp_path):
    said = {"name": "world", "samples": 4, "length": 32}
    report = llmopt.compress("llmopt/reference", "quant.gptq", said)
    report.save(tmp_path / "named")
    facts = read_facts(tmp_path / "named")
    assert facts["calibration"] == {"samples": 4, "tokens": 128}
    assert facts["recipe"]["data"].items() >= said.items()
    report = llmopt.compress("llmopt/reference", "quant.gptq", tiny.ids(4, 32))
    report.save(tmp_path / "ids")
    assert read_facts(tmp_path / "ids")["recipe"] is None


@pytest.mark.parametrize("given", ["llmopt/reference", tiny.make("llama")], ids=["named", "loaded"])
def test_a_report_is_saved_as_its_recipe_says(given, tmp_path):
    plan = {"steps": [{"quant.rtn": {"group_size": 32}}], "format": "dense", "max_shard_size": "200KB"}
    report = llmopt.compress(given, plan, tiny.ids(4, 32))
    report.save(tmp_path / "out")
    assert read_facts(tmp_path / "out")["format"] == "dense"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_compress_with_an_output_is_such_a_run_and_the_dry_run_foretells_its_size(tmp_path):
    plan = {"steps": ["quant.rtn"], "eval": {"tasks": []}}
    report = llmopt.compress("llmopt/reference", plan, output=tmp_path / "out")
    assert read_facts(tmp_path / "out")["recipe"] == report.recipe.resolved()
    assert llmopt.dry_run(plan, model="llmopt/reference")["predicted_bytes"] == report.size
    assert type(report.model).__name__ == "LlamaForCausalLM" and report.tokenizer is not None
