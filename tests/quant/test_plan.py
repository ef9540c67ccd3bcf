import json

import pytest
import torch

from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.weights import coded
from llmopt.quant import RTN
from tests.tiny import make


def test_names_globs_and_parents():
    model = make("llama")
    step = RTN(group_size=16, ignore=["lm_head", "model.layers.0", "*.1.mlp.*", "k_proj"],
               overrides={"v_proj": {"bits": 8}, "model.layers.2.self_attn": {"group_size": -1}})
    found = {t.name: t for t in step.chosen(model)}
    assert sorted(found) == [f"model.layers.{name}" for name in (
        "1.self_attn.o_proj", "1.self_attn.q_proj", "1.self_attn.v_proj", "2.mlp.down_proj", "2.mlp.gate_proj",
        "2.mlp.up_proj", "2.self_attn.o_proj", "2.self_attn.q_proj", "2.self_attn.v_proj")]
    assert found["model.layers.2.self_attn.v_proj"].bits == 8
    assert found["model.layers.2.self_attn.v_proj"].group_size == -1
    assert found["model.layers.1.self_attn.q_proj"].bits == 4


def test_of_several_overrides_the_last_one_says_the_kind_of_numbers():
    step = RTN(group_size=16, overrides={"mlp": {"scheme": "W8A8"}, "down_proj": {"bits": 3},
                                         "*.1.mlp.*_proj": {"scheme": "W5A16", "group_size": 32},
                                         "*.2.mlp.down_proj": {"group_size": 8}})
    found = {t.name: (t.scheme, t.bits, t.group_size) for t in step.chosen(make("llama"))}
    assert found["model.layers.0.mlp.up_proj"] == ("W8A8", 8, -1)
    assert found["model.layers.0.mlp.down_proj"] == (None, 3, 16)
    assert found["model.layers.1.mlp.down_proj"] == ("W5A16", 5, 32)
    assert found["model.layers.2.mlp.down_proj"] == (None, 3, 8)


def test_sixteen_bits_leave_a_weight_dense_and_uncounted():
    model, dense = make("llama"), make("llama")
    meta = RTN(bits=3, group_size=16, overrides={"mlp": {"bits": 16}}).apply(model, Run()).meta
    assert meta["bits"] == 3 and not any("mlp" in name for name in meta["modules"])
    for now, before in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(now.mlp.up_proj.weight, before.mlp.up_proj.weight)
        assert not torch.equal(now.self_attn.q_proj.weight, before.self_attn.q_proj.weight)
    free = RTN(bits=3.5, group_size=16, allocate="zd", overrides={"mlp": {"bits": 16}}).apply(make("llama"), Run()).meta
    assert 3 <= free["bits"] <= 3.5


def test_unknown_names_show_the_nearest():
    with pytest.raises(LlmoptError, match="no module.*'dwn_proj'.*down_proj"):
        RTN(group_size=16, ignore=["dwn_proj"]).apply(make("llama"), Run())
    with pytest.raises(LlmoptError, match="overrides.*'lm_head' matches no weight"):
        RTN(group_size=16, overrides={"lm_head": {"bits": 8}}).apply(make("llama"), Run())


def test_group_size_must_divide():
    model = make("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LlmoptError, match=r"layers\.0\.mlp\.down_proj: group_size 64 .* 96 .* Use 32 .* else 48, 96;"):
        RTN(group_size=64).apply(model, Run())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fields", [{"group_size": 0}, {"group_size": -2}, {"widths": (1, 4)}, {"scale_dtype": "int8"},
                                    {"overrides": {"q_proj": {"bit": 3}}}, {"overrides": {"q_proj": {"bits": 9}}},
                                    {"overrides": {"q_proj": 3}}, {"allocate": "best"}])
def test_bad_fields_are_named(fields):
    with pytest.raises(FieldError, match=next(iter(fields))):
        RTN(**fields)


def test_weights_that_are_not_finite_are_named():
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(LlmoptError, match=r"layers\.1\.mlp\.up_proj: the weight holds NaN"):
        RTN(group_size=16).apply(model, Run())


def test_embeddings_and_head_stay():
    for family in ("llama", "gpt2", "opt", "olmo2"):
        model, dense = make(family), make(family)
        RTN(bits=2, group_size=16).apply(model, Run())
        assert torch.equal(model.get_output_embeddings().weight, dense.get_output_embeddings().weight)
        assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
        assert not any("llmopt" in key for key in model.state_dict())


def test_record_is_json_and_counts_the_scales():
    model = make("llama", torch.bfloat16)
    meta = RTN(bits=4.0, group_size=32).apply(model, Run()).meta
    assert json.loads(json.dumps(meta)) == meta
    assert meta["bits"] == 4 and meta["effective_bits"] == 4 + 16 / 32
    assert meta["weights"] == sum(w.codes.codes.numel() for w in coded(model))
    for symmetric, scale in ((True, 16), (False, 32 + 4)):      # 16 bits in a float32 model, too, but for zero points
        meta = RTN(bits=4, group_size=32, symmetric=symmetric).apply(make("llama"), Run()).meta
        assert meta["effective_bits"] == 4 + scale / 32
    wide = RTN(bits=4, group_size=32, scale_dtype="float32").apply(make("llama"), Run()).meta
    assert wide["effective_bits"] == 5
