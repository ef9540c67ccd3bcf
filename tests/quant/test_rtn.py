"""Rounding to nearest: scales searched for the errors of weights, or of what they do to the outputs."""
import pytest
import torch
from torch import tensor

from llmopt.calibration.inputs import Moments
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.quant import RTN
from llmopt.quant.grid import Spec
from llmopt.quant.rtn import Nearest
from tests.quant.quant_data import batches
from tests.tiny import make


def seen(inputs):
    stats = Moments()
    stats.add(inputs)
    stats.join(inputs)
    return stats


def test_a_large_weight_that_reads_nothing_is_cut_and_one_that_reads_much_is_not():
    """Three weights of one step, one of seven: the range is that of the columns whose inputs count."""
    weight, spec = tensor([[1.0, -1.0, 0.5, 7.0]]), Spec(3, -1, True, True)
    for size, kept in ((tensor([1.0, 1, 1, 0.01]), False), (tensor([0.01, 0.01, 0.01, 1]), True)):
        made = Nearest(search="outputs").quantize(weight.clone(), seen(torch.diag(size)), spec)
        value = made.dequantize(torch.float32)
        assert (abs(float(value[0, 3]) - 7) < 0.2) == kept
        assert (float((value - weight)[0, :3].abs().max()) < 0.3) != kept


def test_a_step_reads_data_for_outputs_alone():
    told = {}
    for search, run in (("weights", Run()), ("outputs", Run(batches()))):
        step = RTN(bits=3, group_size=16, search=search)
        assert step.needs_data == (search == "outputs")
        told[search] = step.apply(make("llama"), run).meta["modules"]["model.layers.0.self_attn.q_proj"]
    assert "output_error" in told["outputs"] and "output_error" not in told["weights"]
    assert told["outputs"]["weight_error"] > told["weights"]["weight_error"]


def test_what_cannot_be_searched_is_said():
    with pytest.raises(FieldError, match="search: 'outputs'.*clip: false"):
        RTN(search="outputs", clip=False)
    with pytest.raises(LlmoptError, match="calibration data"):
        RTN(search="outputs", group_size=16).apply(make("llama"), Run())
    with pytest.raises(LlmoptError, match="overflow"):
        Nearest(search="outputs").quantize(torch.ones(1, 2), seen(tensor([[1.0, torch.inf]])), Spec(3, -1, clip=True))
