"""compress() itself: what it refuses, and what it leaves alone."""
import pytest
import torch

import llmopt
from llmopt.errors import LlmoptError
from llmopt.prune import Magnitude
from llmopt.quant import RTN
from tests import tiny


def test_a_model_in_memory_is_not_compressed_again_once_it_is_quantized():
    model = tiny.make("llama")
    llmopt.compress(model, [RTN(bits=4, group_size=16)])
    for step in (Magnitude(ratio=0.3, refit=False), RTN(bits=3, group_size=16)):
        with pytest.raises(LlmoptError, match="already quantized"):
            llmopt.compress(model, [step])


@torch.no_grad()
def test_dropout_has_no_part_in_it():
    def weights(training):
        torch.manual_seed(int(training))
        model = tiny.make("gpt2").train(training)
        llmopt.compress(model, [Magnitude(ratio=0.3, units=["ffn"])], batches=tiny.ids(8, 24))
        assert model.training == training
        return model.state_dict()

    calm, trained = weights(False), weights(True)
    assert all(torch.equal(calm[key], trained[key]) for key in calm)


@pytest.mark.parametrize(("batches", "says"), [
    ("a text", "there is no such file"), (["a text"], "the model's tokenizer"), (7, "a DataLoader"),
    ([{"ids": tiny.ids()}], "needs input_ids; this one has ids"), ([{"input_ids": tiny.ids() + 90}], "token id 1"),
    ([{"input_ids": tiny.ids() - 90}], "token id -"), (tiny.ids()[None], "token ids")])
def test_batches_that_are_none(batches, says):
    with pytest.raises(LlmoptError, match=says):
        llmopt.compress(tiny.make("llama"), [Magnitude(ratio=0.3)], batches=batches)


def test_a_model_that_computes_nan_is_refused():
    model = tiny.make("llama")
    model.get_decoder().norm.variance_epsilon = -1e9
    with pytest.raises(LlmoptError, match="computes NaN from ordinary tokens"):
        llmopt.compress(model, [RTN(bits=4, group_size=16)])
