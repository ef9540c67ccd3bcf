"""experts.top_k: the model with another config, layer by layer, bad input."""
import pytest
import torch

import llmopt
from llmopt.forecast.size import predict
from llmopt.method import Record, Run
from tests import tiny


@torch.no_grad()
def logits(model, **changes):
    return model(tiny.ids(2, 24), **changes).logits


@pytest.mark.parametrize(("family", "renormalize"), [("qwen3_moe", True), ("olmoe", False)])
def test_it_is_the_model_with_fewer_experts_per_token_in_its_config(family, renormalize):
    shape = dict(num_experts_per_tok=3, norm_topk_prob=renormalize)
    model, fewer = tiny.make(family, **shape), tiny.make(family, **shape | {"num_experts_per_tok": 2})
    with llmopt.attached(model, llmopt.experts.TopK(k=2, renormalize=renormalize)):
        torch.testing.assert_close(logits(model), logits(fewer), rtol=0, atol=1e-5)
    with llmopt.attached(model, llmopt.experts.TopK(k=2, renormalize=not renormalize)):
        assert (logits(model) - logits(fewer)).abs().max() > 1e-2
    with llmopt.attached(model, llmopt.experts.TopK(k=3)):
        torch.testing.assert_close(logits(model), logits(tiny.make(family, **shape)), rtol=0, atol=1e-5)


def test_layers_have_numbers_of_their_own():
    model, found = tiny.make("qwen3_moe"), []
    with llmopt.attached(model, llmopt.experts.TopK(by_layer=(2, 1, 2))):
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda module, args: found.append(args[1].shape))
        logits(model)
    assert found == [(48, 2), (48, 1), (48, 2)]             # what is computed of 48 tokens


@pytest.mark.parametrize(("family", "fields", "said"), [
    ("llama", {}, "its layers have no experts"), ("qwen3_moe", {"k": 3}, "k: 3 given, at most 2, as many as the"),
    ("qwen3_moe", {"k": 0}, "k: 0 given"), ("qwen3_moe", {"by_layer": (0, 1, 1)}, "by_layer: .* numbers from 1"),
    ("qwen3_moe", {"by_layer": (1, 2)}, "by_layer: .* 3 numbers, one for each layer"),
    ("qwen3_moe", {"by_layer": (1, 2, 3)}, "by_layer: 3 given, at most 2")])
def test_bad_input_is_refused_by_name(family, fields, said):
    with pytest.raises(llmopt.LlmoptError, match=said):
        llmopt.experts.TopK(**fields).apply(tiny.make(family), Run())
    with pytest.raises(llmopt.LlmoptError, match=said):
        predict(tiny.make(family), [llmopt.experts.TopK(**fields)])


def test_a_router_that_chooses_fewer_than_a_record_says_is_told_of():
    model = tiny.make("qwen3_moe")
    llmopt.experts.TopK().restore(model, Record({"k": {"0": 2, "1": 5, "2": 2}}))
    with pytest.raises(llmopt.LlmoptError, match="layer 1 is to use 5 experts for each token.* chooses 2"):
        logits(model)


@pytest.mark.parametrize("k", [{"0": 1, "1": 1}, {"0": 1, "1": 1, "2": 0}, {"0": 1, "1": 1, "2": 1, "x": 1}])
def test_a_forged_record_is_refused(k):
    with pytest.raises(llmopt.LlmoptError, match="experts.top_k"):
        llmopt.experts.TopK().restore(tiny.make("qwen3_moe"), Record({"k": k}))
