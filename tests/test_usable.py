"""Models that a program hands over: what llmopt cannot work on is said in one line, before the work."""
import copy

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, LlamaForSequenceClassification

import llmopt
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.model.usable import check_numbers
from llmopt.runtime.rehearsal import cache_bytes_per_token, prompt_length
from tests import tiny

RTN, GPTQ, SPAN, SNAPKV = llmopt.quant.RTN, llmopt.quant.GPTQ, llmopt.heads.Span, llmopt.kv.SnapKV
STEPS = [RTN(bits=8, group_size=16)]


def offloaded(model):
    model.model.layers[1].to("meta")
    return model


def with_twins(model):
    model.model.layers[2] = model.model.layers[0]
    return model


def with_bad_generation(model):
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3
    return model


CASES = {
    "compiled": (torch.compile, "before torch.compile"),
    "compiled in place": (lambda model: model.compile() or model, "before torch.compile"),
    "wrapped": (torch.nn.DataParallel, "model.module"),
    "foreign": (lambda model: torch.nn.Linear(2, 2), "this is a Linear"),
    "no head": (lambda model: AutoModel.from_config(model.config), "no output head"),
    "another head": (lambda model: LlamaForSequenceClassification(model.config), "no output head"),
    "offloaded": (offloaded, "weights are not in memory, such as model.layers.1"),
    "twins": (with_twins, "layers 0 and 2 share weights"),
    "generation config": (with_bad_generation, "generation_config"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_worked_on_is_refused(name, tmp_path):
    change, words = CASES[name]
    model = change(tiny.make("llama"))
    before = copy.deepcopy(dict(model.named_parameters())) if name != "offloaded" else {}
    for work, given in ((llmopt.compress, STEPS), (llmopt.save, tmp_path / "out")):
        with pytest.raises(LlmoptError) as caught:
            work(model, given)
        assert words in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not list(tmp_path.iterdir())


def test_no_forecast_is_made_of_what_cannot_be_worked_on():
    """Before, of layers that are one an IndexError."""
    with pytest.raises(LlmoptError, match="layers 0 and 2 share weights"):
        predict(with_twins(tiny.make("llama")), STEPS)


def test_a_model_in_training_is_worked_on_and_saved_in_eval_mode(tmp_path):
    model, like = (tiny.make("gpt2", resid_pdrop=0.5, embd_pdrop=0.5) for _ in range(2))
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    for each in (model, like):
        llmopt.compress(each, [GPTQ(bits=4, group_size=16)], batches=tiny.ids())
    llmopt.save(model, tmp_path / "out", format="dense")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), like.parameters(), strict=True))


def test_attention_in_both_directions_is_refused_where_attention_counts():
    config = Gemma3TextConfig(**tiny.WIDE, sliding_window=8, query_pre_attn_scalar=16, use_bidirectional_attention=True)
    model = type(tiny.make("gemma3_text"))(config).eval()
    for step in (SPAN(), SNAPKV(ratio=0.5)):
        with pytest.raises(LlmoptError, match="both directions"):
            llmopt.compress(model, [step], batches=tiny.ids())
    llmopt.compress(model, STEPS)


def test_nan_is_found_before_the_work():
    model = tiny.make("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(LlmoptError, match="computes NaN"):
        llmopt.compress(model, STEPS)
    check_numbers(tiny.make("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shapes_tell_what_a_forward_leaves_in_the_cache(family):
    model = tiny.make(family)
    length = prompt_length(model)
    for steps in ([], [SNAPKV(ratio=0.5, window=8)]):
        with llmopt.attached(model, *steps):
            cache = model(tiny.ids(1, length), use_cache=True).past_key_values
            dense = [] if steps else [t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)]
            assert cache_bytes_per_token(model) == (cache.nbytes() if steps else sum(dense)) / length
