"""Some blocks of a model, to measure: what is written of them, and models that cannot do without the others."""
import pytest
import torch
from safetensors.torch import load_file

from llmopt.checkpoint import save as checkpoint
from llmopt.errors import LlmoptError
from llmopt.run import pipeline
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from tests.plans import dense, plan

GPTQ = "[quant.gptq: {bits: 3, group_size: 32, clip: false}]"


def test_some_blocks_only_are_no_model(tmp_path):
    made = plan(tmp_path, dense(tmp_path, "llama"), GPTQ)
    pipeline.run(made, tmp_path / "out", streaming=Streaming(blocks=2))
    names = [name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)]
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    with pytest.raises(LlmoptError, match="no config.json"):
        checkpoint.load(tmp_path / "out")


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "lfm2"])
def test_a_first_block_that_makes_no_model_is_worked_on_as_in_the_whole(family, tmp_path):
    """Tables with a part for each layer, and a block without attention: what the config tells of the others stays."""
    steps = "[quant.gptq: {bits: 4, group_size: 16, clip: false}" + (
        "]" if family == "lfm2" else ", kv.snapkv: {ratio: 0.5}]")
    made, found = plan(tmp_path, dense(tmp_path, family), steps), []
    for blocks_there in (1, None):
        pipeline.run(made, tmp_path / f"{blocks_there}", streaming=Streaming(force=True, blocks=blocks_there))
        files = (tmp_path / f"{blocks_there}").glob("*.safetensors")
        found.append({name: part for file in files for name, part in load_file(file).items()})
    few, every = found
    assert {name.split(".")[2] for name in few if ".layers." in name} == {"0"}
    assert len(few) > 10 and all(torch.equal(part, every[name]) for name, part in few.items())
    assert dry_run(made, Streaming(blocks=1))["predicted_bytes"] > 0


def test_first_blocks_without_attention_are_told_from_a_model_without(tmp_path):
    made = plan(tmp_path, dense(tmp_path, "lfm2"), "[kv.snapkv: {ratio: 0.5}]")
    with pytest.raises(LlmoptError, match=r"lfm2: .* none of its layers of those that are left .*max-blocks"):
        pipeline.run(made, tmp_path / "out", streaming=Streaming(blocks=1))
    pipeline.run(made, tmp_path / "out", streaming=Streaming(blocks=2))
