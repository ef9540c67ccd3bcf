"""Matrices of experts: what they read by hand, which share, the names in files, every orientation, bad input."""
import json
import re
from fnmatch import fnmatch

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import llmopt
from llmopt.calibration.inputs import Inputs, each_weight
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model import expert_weights
from llmopt.model.blocks import blocks
from llmopt.model.stored import rebuilt, stored
from llmopt.quant import GPTQ, HQQ, RTN, Tune
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.making import Making
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from tests import tiny
from tests.plans import contents, dense, plan
from tests.quant.quant_data import batches, loaded_plain, logits

SIXTEEN = {"group_size": 16}


def names(model) -> set[str]:
    return {p.name for block in blocks(model) for p in block.of_experts()}


def routed(model, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the experts of a layer read [N, d], the experts of each token [N, 2]), of the real tokens."""
    seen = []
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].flatten().bool() for batch in batches()]
    return tuple(torch.cat([call[i][mask] for call, mask in zip(seen, masks, strict=True)]) for i in (0, 1))


def test_each_expert_sees_its_own_tokens_the_second_matrix_behind_the_first_as_it_has_become():
    model = tiny.make("qwen3_moe")
    wanted = {name for name in names(model) if name.startswith("model.layers.1.") and name.endswith(".2")}
    x, index = routed(model, 1)
    own = x[(index == 2).any(1)]
    assert 0 < len(own) < len(x)
    found = {}
    for projection, seen in each_weight(model, Run(batches()), wanted, "test", Inputs("moments")):
        found[projection.parameter] = seen
        if projection.parameter == "gate_up_proj":
            projection.write(projection.weight.sign() * 0.1)
    experts = model.model.layers[1].mlp.experts
    gate, up = (own @ experts.gate_up_proj[2].T).chunk(2, 1)
    inner = torch.nn.functional.silu(gate) * up
    for parameter, read in (("gate_up_proj", own), ("down_proj", inner)):
        torch.testing.assert_close(found[parameter].hessian, 2 / len(own) * read.T @ read)
        assert found[parameter].told == {"tokens": len(own), "shared": False}


def test_experts_with_few_tokens_share_those_of_the_layer_and_the_record_counts_them():
    model = tiny.make("qwen3_moe")
    x, index = routed(model, 0)
    counts = torch.bincount(index.flatten(), minlength=4).tolist()
    least = sorted(counts)[1]                                      # one expert has fewer
    poor = counts.index(min(counts))
    layer = {name for name in names(model) if ".layers.0." in name}
    got = {p.name: seen for p, seen in each_weight(model, Run(batches()), layer, "test", Inputs(
        "moments", min_tokens=least), edits=False)}
    first, second = (got[f"model.layers.0.mlp.experts.{name}.{poor}"] for name in ("gate_up_proj", "down_proj"))
    torch.testing.assert_close(first.hessian, 2 / len(x) * x.T @ x)
    experts = model.model.layers[0].mlp.experts
    gate, up = (x @ experts.gate_up_proj[poor].T).chunk(2, 1)
    inner = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(second.hessian, 2 / len(x) * inner.T @ inner)
    assert first.told == {"tokens": min(counts), "shared": True}
    assert sum(seen.told["shared"] for seen in got.values()) == 2
    told = GPTQ(min_tokens=1000, **SIXTEEN).apply(tiny.make("qwen3_moe"), Run(batches())).meta
    assert (told["experts"], told["sharing"], told["unseen"]) == (24, 24, 0)
    told = GPTQ(calibrate_all_experts=True, ignore=("self_attn",), **SIXTEEN).apply(model, Run(batches())).meta
    assert told["sharing"] == 0
    assert told["modules"][f"model.layers.0.mlp.experts.down_proj.{poor}"]["tokens"] == min(counts)


def test_an_expert_that_no_token_reached():
    def lonely():
        model = tiny.make("mixtral")
        model.model.layers[2].mlp.gate.weight.data[1] = 0
        model.model.layers[2].post_attention_layernorm.weight.data.zero_()[0] = 1
        model.model.embed_tokens.weight.data[:, 0] = 90
        model.model.layers[2].mlp.gate.weight.data[0] = 1
        return model

    told = GPTQ(**SIXTEEN).apply(lonely(), Run(batches())).meta
    assert told["unseen"] >= 2 and told["modules"]["model.layers.2.mlp.experts.down_proj.1"]["shared"]
    with pytest.raises(LlmoptError, match=r"layers\.\d\.mlp\.experts: expert 1 was sent no token .* min_tokens: 1"):
        GPTQ(min_tokens=0, **SIXTEEN).apply(lonely(), Run(batches()))


def test_plain_transformers_loads_them_from_the_names_that_vllm_expects(tmp_path):
    saved = {}
    for family, part in (("qwen3_moe", "mlp.experts.3.gate_proj"), ("mixtral", "block_sparse_moe.experts.1.w3")):
        model = tiny.make(family)
        llmopt.compress(model, [GPTQ(bits=3, **SIXTEEN)], batches())
        folder = llmopt.save(model, tmp_path / family)
        saved[str(folder)] = model
        with safe_open(folder / "model.safetensors", "pt") as file:
            held = set(file.keys())
        assert {f"model.layers.2.{part}.weight_{what}" for what in ("packed", "scale", "shape")} <= held
        assert not [name for name in held if "gate_up" in name]
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        patterns = [t for group in config["config_groups"].values() for t in group["targets"] if t.startswith("re:")]
        hit = {pattern: [n for n in held if n.endswith("_packed") and re.match(pattern[3:], n[:-len(".weight_packed")])]
               for pattern in patterns}
        assert [len(found) for found in hit.values()] == [9 * len(model.model.layers[0].mlp.experts.down_proj)]
    for folder, fresh, mine in loaded_plain(saved, tmp_path):
        assert torch.equal(fresh, mine), folder


def test_experts_that_are_given_their_rows_one_after_the_other(tmp_path):
    """Llama 4: every expert reads its tokens times the router's weight. In the files each has matrices of its own."""
    model, seen = tiny.make("llama4_text"), []
    part = model.model.layers[1].feed_forward
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    x = torch.cat([rows[batch["attention_mask"].flatten().bool()] for rows, batch in
                   zip(seen, batches(), strict=True)])
    scores, chosen = (x @ part.router.weight.T).max(1)
    best = int(chosen.bincount().argmax())
    own = (x * scores.sigmoid()[:, None])[chosen == best]
    gate, up = (own @ part.experts.gate_up_proj[best]).chunk(2, 1)
    wanted = {name for name in names(model) if name.endswith(f".{best}")}
    got = {p.parameter: found for p, found in each_weight(model, Run(batches()), wanted, "test", Inputs("moments"),
                                                          edits=False)}
    for parameter, read in (("gate_up_proj", own), ("down_proj", torch.nn.functional.silu(gate) * up)):
        torch.testing.assert_close(got[parameter].hessian, 2 / len(own) * read.T @ read)
        assert got[parameter].told == {"tokens": len(own), "shared": False} and 1 < len(own) < len(x)
    dense = {name: value.clone() for name, value in part.experts.named_parameters()}
    llmopt.compress(model, [GPTQ(bits=4, **SIXTEEN)], batches())
    assert not any(torch.equal(value, dense[name]) for name, value in part.experts.named_parameters())
    for form in ("portable", "dense"):
        folder = llmopt.save(model, tmp_path / form, format=form)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()), logits(model))
    with safe_open(tmp_path / "portable/model.safetensors", "pt") as file:
        held = {name for name in set(file.keys()) if ".experts." in name and name.endswith("weight_packed")}
    assert held == {f"model.layers.1.feed_forward.experts.{expert}.{name}_proj.weight_packed"
                    for expert in range(4) for name in ("gate", "up", "down")}


def test_turned_stacks_are_rounded_along_what_they_read():
    model, dense = tiny.make("gpt_oss"), tiny.make("gpt_oss")
    RTN(bits=4, **SIXTEEN).apply(model, Run())
    for stack in ("gate_up_proj", "down_proj"):
        mine, theirs = (getattr(m.model.layers[1].mlp.experts, stack)[2] for m in (model, dense))
        rounded = round_to_nearest(theirs.T.contiguous(), Spec(4, 16, clip=True))
        assert torch.equal(mine, rounded.dequantize(torch.float32).T)


def test_a_layer_travels_through_its_file_where_some_experts_stay_dense():
    model = tiny.make("gpt_oss")
    RTN(bits=4, overrides={"*.experts.gate_up_proj.2": {"bits": 16}, "experts.down_proj": {"bits": 8}},
        **SIXTEEN).apply(model, Run())
    layer, like = model.model.layers[0], tiny.make("gpt_oss").model.layers[0]
    vars(like.mlp.experts)[expert_weights.STACKS] = vars(layer.mlp.experts)[expert_weights.STACKS]
    tensors, record = stored(layer)
    assert "mlp.experts.gate_up_proj.2" in tensors and "mlp.experts.gate_up_proj" not in tensors
    state, results = rebuilt(like, tensors, json.loads(json.dumps(record)))
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    assert sorted(codes.bits for weight, codes in results if fnmatch(weight.name, "*experts*")) == [4] * 3 + [8] * 4


def test_less_is_lost_than_by_rounding():
    losses = {}
    dense = logits(tiny.make("qwen3_moe"))
    for step in (RTN(bits=3, ignore=("self_attn",), **SIXTEEN), GPTQ(bits=3, ignore=("self_attn",), **SIXTEEN)):
        model = tiny.make("qwen3_moe")
        step.apply(model, Run([{"input_ids": tiny.ids(24, 48), "attention_mask": torch.ones(24, 48).long()}]))
        losses[step.name] = float((logits(model) - dense).square().mean())
    assert losses["quant.gptq"] < 0.7 * losses["quant.rtn"]


@pytest.mark.parametrize(("step", "said"), [
    (GPTQ(group_size=64), r"down_proj\.0: group_size 64 does not divide its 32 input .* overrides: {down_proj: "),
    (GPTQ(bits=3.5, allocate="zd", group_size=16), "allocate: 'zd' given, uniform or sensitivity where experts"),
    (Tune(overrides={"experts": {"bits": 3}}, **SIXTEEN), "quant.tune does not know experts"),
    (Tune(**SIXTEEN), "quant.tune does not know experts; take quant.gptq, or ignore: "),
    (RTN(scheme="FP8_DYNAMIC"), "what experts read cannot be rounded"),
    (RTN(ignore=("expert",), **SIXTEEN), "ignore: no module of this model matches 'expert'")])
def test_what_cannot_be_done_is_named(step, said):
    with pytest.raises(LlmoptError, match=said):
        predict(tiny.make("qwen3_moe"), [step])


@pytest.mark.parametrize(("family", "step", "said"), [
    ("qwen3_moe", RTN(overrides={"experts.down_proj": {"bits": 8}}, **SIXTEEN), "all of them have the same bits"),
    ("qwen3_moe", RTN(overrides={"*.down_proj.1": {"bits": 16}}, **SIXTEEN), "all of them have the same bits"),
    ("qwen3_moe", RTN(ignore=("layers.1.mlp.experts",), **SIXTEEN), r"layers\.1\.mlp\.experts\.\w+: .* of all layers"),
    ("qwen3_moe", RTN(scale_dtype="float16", **SIXTEEN), "scale_dtype: 'float16' given, float32, .* experts, or"),
    ("qwen3_moe", HQQ(symmetric=False, **SIXTEEN), "integers without zero points alone")])
def test_what_plain_transformers_cannot_load_is_named_before_the_work_and_can_be_had_dense(family, step, said):
    with pytest.raises(LlmoptError, match=said):
        predict(tiny.make(family), [step])
    assert predict(tiny.make(family), [step], "dense").steps


def test_experts_alone_have_bits_of_their_own(tmp_path):
    model = tiny.make("qwen3_moe")
    own = {"experts": {"bits": 3}, "o_proj": {"bits": 5}}
    llmopt.compress(model, [RTN(bits=8, overrides=own, embedding={"bits": 8}, **SIXTEEN)])
    folder = llmopt.save(model, tmp_path / "out")
    (_, fresh, mine), = loaded_plain({str(folder): model}, tmp_path)
    assert torch.equal(fresh, mine)


def test_what_was_loaded_can_be_saved_again_then_the_experts_are_dense(tmp_path):
    model = tiny.make("qwen3_moe")
    llmopt.compress(model, [RTN(bits=4, **SIXTEEN)])
    llmopt.save(model, tmp_path / "one")
    again, _ = llmopt.load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(llmopt.load(tmp_path / "two")[0]), logits(model))
    llmopt.save(again, tmp_path / "three", format="dense")
    assert torch.equal(logits(llmopt.load(tmp_path / "three")[0]), logits(model))


@pytest.mark.parametrize(("family", "extra"), [("qwen3_moe", ""), pytest.param("gpt_oss", "", marks=pytest.mark.full)])
def test_a_run_that_was_cut_off_among_experts_goes_on_streamed(family, extra, tmp_path, monkeypatch):
    made = plan(tmp_path, dense(tmp_path, family), "[quant.gptq: {bits: 4, group_size: 16}]", extra)
    pipeline.run(made, tmp_path / "whole")
    solve, done = Making._solve, []

    def cut(self, projection, *rest):
        done.append(projection.name)
        if len(done) == 20:
            raise KeyboardInterrupt
        return solve(self, projection, *rest)

    monkeypatch.setattr(Making, "_solve", cut)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made, tmp_path / "out", streaming=Streaming(True))
    assert "layers.1.mlp.experts" in done[-1]
    monkeypatch.setattr(Making, "_solve", solve)
    assert pipeline.run(made, tmp_path / "out", streaming=Streaming(True), resume=True).messages
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_stack_whose_products_cannot_be_seen_stays_dense(monkeypatch):
    model = tiny.make("qwen3_moe")
    kind = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "forward", lambda self, x, index, weights: torch.einsum(
        "nd,nefd,nk->nd", x, self.gate_up_proj[index], weights))
    assert not names(model)
    with pytest.raises(LlmoptError, match=r"x\.mlp\.experts: how it uses .* cannot be seen, so they stay dense"):
        expert_weights.stacks_of(expert_weights.experts_of(model.model.layers[0], "x"))


def test_packed_experts_are_loaded_without_a_false_alarm(tmp_path, caplog):
    model = tiny.make("qwen3_moe")
    llmopt.compress(model, RTN(group_size=16))
    llmopt.save(model, tmp_path / "out")
    with caplog.at_level("WARNING"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert "Could not match" not in caplog.text


@pytest.mark.parametrize(("family", "shared", "stays"), [
    ("qwen2_moe", "shared_expert", "shared_expert_gate"),
    pytest.param("qwen3_next", "shared_expert", "shared_expert_gate", marks=pytest.mark.full),
    pytest.param("deepseek_v3", "shared_experts", "mlp.gate", marks=pytest.mark.full),
    ("glm4_moe", "shared_experts", "mlp.gate"), ("llama4_text", "shared_expert", "router")])
def test_shared_experts_are_quantized_and_what_gates_them_stays(family, shared, stays, tmp_path):
    model = tiny.make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = llmopt.compress(model, [GPTQ(bits=3, **SIXTEEN)], batches()).records[0]["meta"]["modules"]
    of_them = [name.removesuffix(".weight") for name in before if f".{shared}." in name]
    assert of_them and all(told[name]["bits"] == 3 for name in of_them)
    assert not any(torch.equal(model.get_parameter(f"{name}.weight"), before[f"{name}.weight"]) for name in of_them)
    gates = [name for name in before if name.endswith(f".{stays}.weight")]
    assert gates and all(torch.equal(model.state_dict()[name], before[name]) for name in gates)
    folder = llmopt.save(model, tmp_path / "out", format="dense" if family == "llama4_text" else "portable")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()), logits(model))


def test_a_dense_layer_among_those_with_experts_is_quantized():
    told = RTN(bits=4, **SIXTEEN).apply(tiny.make("qwen3_moe", mlp_only_layers=[1]), Run()).meta["modules"]
    assert {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")} <= {*told}
