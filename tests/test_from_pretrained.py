"""Every way in which transformers loads a checkpoint, once llmopt is imported: methods in force, true shapes."""
import pickle

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeForCausalLM,
    pipeline,
)

import llmopt
from llmopt.model.modeling import put_tensor
from llmopt.runtime import attachment
from tests import tiny


class Mine(LlamaForCausalLM):
    """A user's subclass, with an argument of its own."""

    @classmethod
    def from_pretrained(cls, *args, mine, **kwargs):
        return super().from_pretrained(*args, **kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A kv method with a tensor of its own on layers of different widths; packed weights; nothing done at all."""
    root = tmp_path_factory.mktemp("folders")
    model = tiny.make("llama")
    llmopt.compress(model, [llmopt.prune.Magnitude(ratio=0.3, scope="global", units=["ffn"], refit=False),
                            llmopt.kv.Streaming(budget=8, sinks=2)])
    assert model.config.is_heterogeneous
    put_tensor(model, "0.numbers", torch.arange(3.0))
    llmopt.save(model, root / "layers")
    model = tiny.make("llama")
    llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=16), llmopt.kv.Streaming(budget=8, sinks=2)])
    llmopt.save(model, root / "packed")
    tiny.make("llama").save_pretrained(root / "dense")
    return root


@torch.no_grad()
def turns(model):
    """What the decoder makes of a prompt, and of a few tokens more, for which the cache was made smaller."""
    ids = tiny.ids(2, 24)
    first = model.base_model(ids[:, :20], use_cache=True)
    rest = model.base_model(ids[:, 20:], past_key_values=first.past_key_values)
    return torch.cat([first.last_hidden_state, rest.last_hidden_state], 1)


@pytest.mark.parametrize(("cls", "options"), [
    (LlamaForCausalLM, {}), (Mine, {"mine": 1}), (AutoModel, {}), (LlamaForSequenceClassification, {"num_labels": 2}),
    (LlamaForCausalLM, {"device_map": "cpu"}),
    (LlamaForCausalLM, {"dtype": "float32", "attn_implementation": "eager"})],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value))
def test_any_class_has_the_methods_and_the_shapes(folders, cls, options):
    model = cls.from_pretrained(folders / "layers", **options)
    assert isinstance(model, LlamaForCausalLM if cls is Mine else object) and attachment(model)
    assert torch.equal(model.get_buffer("llmopt.0.numbers"), torch.arange(3.0))
    expected = turns(AutoModelForCausalLM.from_pretrained(folders / "layers"))
    torch.testing.assert_close(turns(model), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_missing_or_made_up(folders):
    for name in ("layers", "packed"):
        model, info = LlamaForCausalLM.from_pretrained(folders / name, output_loading_info=True)
        assert attachment(model) and not any(info.values())
    _, info = AutoModel.from_pretrained(folders / "layers", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_a_dense_checkpoint_gives_the_very_class(folders):
    for cls, options in ((LlamaForCausalLM, {}), (Mine, {"mine": 1})):
        assert type(cls.from_pretrained(folders / "dense", **options)) is cls
    tiny.make("gpt2").save_pretrained(folders / "gpt2")
    assert type(AutoModel.from_pretrained(folders / "gpt2")) is GPT2Model


def test_names_of_packed_weights_that_a_bare_decoder_lacks_are_refused(folders):
    with pytest.raises(llmopt.LlmoptError, match="LlamaModel cannot read quantized weights"):
        AutoModel.from_pretrained(folders / "packed")


def test_a_model_without_language_head_can_be_pickled_but_not_written(folders, tmp_path):
    model = AutoModel.from_pretrained(folders / "layers")
    assert torch.equal(turns(pickle.loads(pickle.dumps(model))), turns(model))
    with pytest.raises(llmopt.LlmoptError, match="no language-model head"):
        model.save_pretrained(tmp_path / "m")


def test_a_pipeline_has_the_methods_in_force(tmp_path):
    model, tokenizer = llmopt.load("llmopt/reference")
    llmopt.compress(model, [llmopt.kv.SnapKV(budget=16, window=8)])
    llmopt.save(model, tmp_path / "m", tokenizer=tokenizer)
    said = pipeline("text-generation", model=str(tmp_path / "m"))
    assert attachment(said.model)
    assert said("the fox runs near the river .", max_new_tokens=4)[0]["generated_text"]


def test_experts_are_computed_as_without_llmopt(tmp_path):
    tiny.make("qwen3_moe").save_pretrained(tmp_path / "m")
    ways = [cls.from_pretrained(tmp_path / "m").config._experts_implementation
            for cls in (AutoModelForCausalLM, Qwen3MoeForCausalLM)]
    assert ways[0] == ways[1] != "eager"
