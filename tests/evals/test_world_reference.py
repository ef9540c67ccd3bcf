"""The committed weights: their shape, what they know, and that damage shows."""

import pytest
import torch
from llmopt_evals.world import reference_path
from llmopt_evals.world.check import brittleness, knowledge, table
from llmopt_evals.world.damage import round_to_nearest, without_channels
from llmopt_evals.world.model import build, export
from transformers import AutoConfig, AutoModelForCausalLM

from tests import warm
from tests.command import command


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(reference_path(), dtype=torch.float32).eval()


def test_shape_is_what_the_methods_need(model):
    config = AutoConfig.from_pretrained(reference_path())
    assert config.num_hidden_layers >= 6 and config.num_attention_heads == 8 and config.num_key_value_heads == 4
    assert config.head_dim >= 16 and config.tie_word_embeddings
    inside = [m for name, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(inside) == 42 and all(m.in_features % 128 == 0 for m in inside)
    assert model.get_input_embeddings().weight.numel() <= sum(p.numel() for p in model.parameters()) / 3


def test_folder_is_small_stock_and_complete():
    names = {file.name for file in reference_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in reference_path().iterdir()) < 12e6
    assert not any(name.endswith((".py", ".bin", ".pt")) for name in names)
    assert "license: apache-2.0" in (reference_path() / "README.md").read_text()


def test_knowledge_meets_its_targets(model):
    results = knowledge(model, documents=6)
    assert all(result.met for result in results), table(results)


@pytest.mark.full
def test_damage_shows(model):
    results = brittleness(model)
    assert all(result.met for result in results), table(results)


def test_rounding_by_hand():
    weight = torch.tensor([[3.5, -3.5, 1.2, -0.4]])  # 3 bits, one group: scale 1, codes 3, -4, 1, 0
    assert round_to_nearest(weight, 3, group=4).tolist() == [[3.0, -4.0, 1.0, 0.0]]


def test_channels_removed_are_the_share_asked_for(model):
    damaged = without_channels(model, 0.25)
    columns = damaged.model.layers[3].mlp.down_proj.weight.abs().sum(0)
    assert int((columns == 0).sum()) == columns.numel() // 4
    assert (model.model.layers[3].mlp.down_proj.weight.abs().sum(0) > 0).all()


@pytest.mark.full
def test_check_fails_a_model_that_knows_nothing(tmp_path):
    export(build(num_hidden_layers=1), tmp_path / "blank", [])
    done = warm.run("-m", "llmopt_evals.world.check", tmp_path / "blank", "--documents", "2", env=command()[1])
    assert done.returncode == 1 and "MISSED" in done.stdout
