"""Checkpoints say under the names of transformers 4 what they say under those of 5, and load as before."""
import copy
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import llmopt
from llmopt.checkpoint.card import render
from llmopt.checkpoint.older import with_rotary_names
from llmopt.recipe.reader import Recipe
from llmopt.run.pipeline import run
from llmopt.specs import ModelSpec
from tests import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
SOURCES = {             # architecture, what its file of the time of transformers 4 says
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "plain": ("mistral", {"rope_theta": 7e4}),
    "yarn": ("qwen3", {"rope_theta": 1e6, "rope_scaling": YARN}),
    "linear": ("gemma2", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic": ("olmo2", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "two bases": ("gemma3_text", {"rope_theta": 3e6, "rope_local_base_freq": 2e4,
                                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "share": ("gpt_neox", {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
    "longrope": ("phi3", {"rope_theta": 2e4, "rope_scaling": LONG, "original_max_position_embeddings": 64,
                          "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_old_names_come_back_and_the_new_ones_hold(name):
    kind, said = SOURCES[name]
    base = {k: v for k, v in tiny.CONFIGS[kind].to_dict().items() if k != "rope_parameters"}
    config = AutoConfig.for_model(**(base | copy.deepcopy(said)))
    written = json.loads(config.to_json_string())
    made = with_rotary_names(written)
    assert {key: made[key] for key in said} == said
    assert made["rope_parameters"] == written["rope_parameters"]
    assert AutoConfig.for_model(**copy.deepcopy(made)).rope_parameters == config.rope_parameters


def test_a_config_with_infinity_is_read_as_it_was_written():
    config = json.loads(tiny.CONFIGS["llama"].to_json_string()) | {"attention_dropout": {"__float__": "Infinity"}}
    assert with_rotary_names(config)["attention_dropout"] == config["attention_dropout"]


def test_what_old_names_cannot_say_is_left_out_and_told(tmp_path):
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = tiny.make("gemma3_text", rope_parameters={"full_attention": scaled, "sliding_attention": scaled})
    folder = llmopt.save(model, tmp_path / "out")
    assert not {"rope_theta", "rope_local_base_freq", "rope_scaling"} & json.loads(
        (folder / "config.json").read_text()).keys()
    assert "transformers>=5" in render(folder)


@pytest.fixture
def source(tmp_path):
    """A folder as transformers 4 wrote it."""
    folder = tmp_path / "m"
    tiny.make("llama").save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "the", "fox", "runs"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "backend"}
    file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}))
    return folder


def test_the_tokenizer_keeps_its_class_and_the_card_no_path(source):
    out = source.parent / "out"
    run(Recipe(model=ModelSpec(id=str(source))), out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["add_bos_token"]) == ("PreTrainedTokenizerFast", True)
    assert not {"backend", "is_local", "local_files_only"} & config.keys()
    before, after = (AutoTokenizer.from_pretrained(folder)("the fox runs").input_ids for folder in (source, out))
    assert before == after
    card = (out / "README.md").read_text()
    assert "base_model:" not in card.split("---")[1] and str(source.parent) not in card and "# m, compressed" in card
    assert "4.56" in card


def test_a_tokenizer_of_no_known_source_has_a_class_of_both_versions(source):
    out = source.parent / "out"
    llmopt.save(tiny.make("llama"), out, tokenizer=AutoTokenizer.from_pretrained(source))
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
