"""A weight is more than `module.weight`: another parameter, one expert of a stack, another kind of module."""
import copy
import json

import pytest
import torch
from torch import nn

from llmopt.checkpoint.compressed_tensors import export
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks, layer_list
from llmopt.model.stored import described, rebuilt, stored
from llmopt.model.weights import Projection, Weight, check_consistent, coded
from llmopt.quant import RTN
from llmopt.quant.grid import Spec, round_to_nearest
from tests import tiny


class Packed(nn.Module):
    """A foreign linear layer: no weight that could be read."""

    def __init__(self, inside: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = inside.in_features, inside.out_features, inside.bias


def expert(model, index: int) -> Projection:
    path = "model.layers.0.mlp.experts"
    return Projection(path, model.get_submodule(path), "gate_up_proj", index)


def test_a_foreign_module_is_not_taken_for_conv1d():
    linear = nn.Linear(6, 4)
    foreign = Projection("x", Packed(linear))
    assert not foreign.transposed
    assert (foreign.out_features, foreign.in_features) == (4, 6)
    conv = blocks(tiny.make("gpt2"))[0].ffn_in[0]
    assert conv.transposed and (conv.out_features, conv.in_features) == (96, 64)


def test_one_expert_of_a_stack_is_seen_named_and_written_alone():
    model = tiny.make("qwen3_moe")
    before, one = copy.deepcopy(model.state_dict()), expert(model, 2)
    assert (one.out_features, one.in_features) == (64, 64)
    assert one.key in before and one.name == f"{one.key}.2"
    one.write(torch.zeros(64, 64))
    stack, was = model.state_dict()[one.key], before[one.key]
    assert not stack[2].any() and all(torch.equal(stack[i], was[i]) for i in (0, 1, 3))


def test_codes_belong_to_one_expert_and_are_checked_against_it():
    model = tiny.make("qwen3_moe")
    for index in (1, 3):
        one = expert(model, index)
        codes = round_to_nearest(one.weight.clone(), Spec(4, 32))
        one.codes = codes
        one.write(codes.dequantize(torch.float32))
        assert expert(model, index).codes is codes and expert(model, 0).codes is None
    assert [w.expert for w in coded(model)] == [1, 3]
    check_consistent(model)
    with pytest.raises(LlmoptError, match="gate_up_proj: plain transformers loads packed experts if all"):
        export(model)
    expert(model, 3).weight[0, 0] += 1
    with pytest.raises(LlmoptError, match="gate_up_proj.3: the weight was changed"):
        check_consistent(model)


def test_a_parameter_of_another_name_travels_through_a_file():
    """Nothing on the way from the quantizer to a block's file and back assumes NAME.weight."""
    model = tiny.make("llama")
    layer = layer_list(model)[0]
    module = layer.mlp.up_proj
    del module._parameters["weight"]
    module.kernel = nn.Parameter(torch.randn(96, 64))
    one = Weight("mlp.up_proj", module, "kernel")
    one.codes = round_to_nearest(one.weight.clone(), Spec(4, 32))
    one.write(one.codes.dequantize(torch.float32))
    tensors, record = stored(layer)
    assert "mlp.up_proj.kernel_packed" in tensors and "mlp.up_proj.kernel" not in tensors
    like = copy.deepcopy(layer)
    state, results = rebuilt(like, tensors, json.loads(json.dumps(record)))
    assert torch.equal(state["mlp.up_proj.kernel"], one.weight)
    assert [(weight.key, codes.bits) for weight, codes in results] == [("mlp.up_proj.kernel", 4)]


def test_records_name_weights_as_recipes_do():
    model = tiny.make("phi3")
    RTN(bits=4, group_size=32).apply(model, Run())
    found = described(coded(layer_list(model)[1]))
    assert list(found) == ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
