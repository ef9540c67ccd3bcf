"""transform.smoothquant: its factors by hand, its limits, what it flattens."""
import pytest
import torch

from llmopt.calibration.walk import walk
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.transform import SmoothQuant
from llmopt.transform.smoothquant import largest_inputs
from tests import tiny
from tests.test_inputs import batches
from tests.transform.test_rotate import logits, lost_to_int8


def test_factors_by_hand():
    inputs, weights = torch.tensor([16., 4., 0., 3.]), torch.tensor([1., 4., 2., 0.])
    assert SmoothQuant(alpha=0.5).factor(inputs, weights).tolist() == [4., 1., 1., 1.]
    assert SmoothQuant(alpha=1).factor(inputs, weights).tolist() == [16., 4., 1., 1.]
    assert SmoothQuant(alpha=0).factor(inputs, weights).tolist() == [1., .25, 1., 1.]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_with_half_of_it_inputs_and_weights_have_the_same_largest_sizes(family):
    model = tiny.make(family, norms=True)
    expected = logits(model)
    record = SmoothQuant().apply(model, Run(batches()))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    visit = next(walk(model, batches()))
    for group in (visit.block.attn_in, visit.block.ffn_in):
        weights = torch.stack([reader.weight.abs().amax(0) for reader in group]).amax(0)
        torch.testing.assert_close(largest_inputs(visit)[group[0].name], weights, rtol=1e-3, atol=1e-4)
    for peaks in record.meta["blocks"]:
        assert set(peaks["peaks"]) == {"attn_in", "ffn_in"}
        assert all(after < before for before, after in peaks["peaks"].values())


def test_all_of_it_makes_the_largest_inputs_one():
    model = tiny.make("llama", norms=True)
    SmoothQuant(alpha=1).apply(model, Run(batches()))
    largest = largest_inputs(next(walk(model, batches())))[blocks(model)[0].attn_in[0].name]
    torch.testing.assert_close(largest, torch.ones(64), rtol=1e-4, atol=1e-4)


def test_planted_outliers_of_activations_do_no_harm():
    assert lost_to_int8(SmoothQuant()) < lost_to_int8() / 5


def test_norms_behind_the_writers_are_named():
    with pytest.raises(LlmoptError, match="olmo2: .* its norms stand behind the writers"):
        predict(tiny.make("olmo2"), [SmoothQuant()])
