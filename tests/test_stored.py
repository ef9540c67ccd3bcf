"""A block as it lies in the journal, codes and all, and as it is rebuilt from there."""
import json

import pytest
import torch

import llmopt
from llmopt.method import Run
from llmopt.model.blocks import layer_list
from llmopt.model.stored import rebuilt, stored
from llmopt.model.weights import coded
from llmopt.quant import GPTQ, RTN
from tests import tiny


@pytest.mark.parametrize(("family", "step"), [
    ("llama", GPTQ(bits=3, group_size=16, symmetric=False, static_groups=False)),
    ("gpt2", RTN(bits=5, group_size=32, overrides={"c_attn": {"bits": 16}})),
    ("phi3", RTN(bits=2, group_size=-1, scale_dtype="float16")),
    ("llama", RTN(scheme="NVFP4")), ("phi3", RTN(scheme="MXFP4A16")), ("qwen2", GPTQ(scheme="FP8")),
    ("llama", RTN(scheme="MXFP8")), ("llama", RTN(scheme="W8A8"))])
def test_a_layer_is_rebuilt_from_what_is_stored(family, step, tmp_path):
    model = tiny.make(family)
    llmopt.compress(model, [step], batches=tiny.ids(4, 32))
    layer, like = layer_list(model)[0], layer_list(tiny.make(family))[0]
    tensors, record = stored(layer)
    alone = [name for name in tensors if name.removesuffix(".weight") in record]         # codes alone
    assert all(tensors[name].itemsize == 1 for name in alone)
    state, results = rebuilt(like, tensors, json.loads(json.dumps(record)))
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    for weight, (again, codes) in zip(coded(layer), results, strict=True):
        assert (again.key, again.transposed) == (weight.key, weight.transposed)
        assert {k: v for k, v in vars(codes).items() if not isinstance(v, torch.Tensor)} == \
               {k: v for k, v in vars(weight.codes).items() if not isinstance(v, torch.Tensor)}
        assert torch.equal(codes.dequantize(torch.float32), weight.codes.dequantize(torch.float32))


def test_dense_copies_can_go_before_their_codes_are_packed():
    model, twin = (tiny.make("gpt_oss") for _ in range(2))
    for each in (model, twin):
        RTN(bits=4, group_size=16, overrides={"*.experts.gate_up_proj.2": {"bits": 16}}).apply(each, Run())
    (tensors, record), (kept, told) = stored(model.model.layers[0], release=True), stored(twin.model.layers[0])
    assert record == told and tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    gone = {name for name, parameter in model.model.layers[0].named_parameters() if parameter.is_meta}
    assert gone == {"mlp.experts.down_proj", *(f"self_attn.{name}_proj.weight" for name in "qkvo")}
