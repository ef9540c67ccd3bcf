"""Checkpoints of true shapes: the published numbers of parameters, and files that load."""
import pytest
import torch
from llmopt_evals import synthetic
from transformers import AutoModelForCausalLM

from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.model import skeleton
from tests import tiny


@pytest.mark.parametrize(("name", "parameters"), [("llama-7b", 6_738_415_616), ("llama-1b", 1_235_814_400),
                                                  ("qwen3-0.6b", 596_049_920)])
def test_the_shapes_are_the_true_ones(name, parameters):
    assert skeleton.skeleton(synthetic.shape_of(name), torch.bfloat16).num_parameters() == parameters


def test_another_number_of_blocks_changes_nothing_else():
    whole, cut = (skeleton.skeleton(synthetic.shape_of("qwen3-0.6b", layers), torch.bfloat16) for layers in (None, 2))
    block = sum(p.numel() for p in whole.model.layers[0].parameters())
    assert whole.num_parameters() - cut.num_parameters() == 26 * block


def test_what_is_written_loads_and_repeats(tmp_path):
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        synthetic.write(tiny.CONFIGS["qwen3"], tmp_path / folder, seed, max_shard_size="50KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert float(model.get_input_embeddings().weight.detach().float().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((model.model.norm.weight == 1).all())
    files = [{f.name: f.read_bytes() for f in (tmp_path / n).glob("*.safetensors")} for n in ("one", "two", "three")]
    assert len(files[0]) > 2
    assert files[0] == files[1] != files[2]
    assert shards.written_bytes(tmp_path / "one") > 2 * model.num_parameters()


def test_an_output_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LlmoptError, match="not empty"):
        synthetic.write(tiny.CONFIGS["llama"], tmp_path)
