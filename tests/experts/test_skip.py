"""experts.skip: what is skipped is not computed, the threshold, both ends, padding, bad input."""
import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import llmopt
from llmopt.experts.threshold import bisected, candidates, first_batches, layer_weights, skipped
from llmopt.forecast.size import predict
from llmopt.method import Record, Run
from llmopt.model.experts import Routed
from llmopt.runtime.attach import attach, detach
from llmopt.runtime.gates import gated
from tests import tiny

CONTRACT = {"ratio": 0.33, "tokens": 300, "whole_layers": True}         # a third: of mixtral a layer, with one a token


def data(padded=0, rows=4, length=32):
    ids, mask = tiny.ids(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[:, length - padded:] = 0
    return Run(batches=[{"input_ids": ids, "attention_mask": mask}])


@torch.no_grad()
def logits(model, ids=None, **given):
    return model(tiny.ids(2, 24) if ids is None else ids, **given).logits


def without_experts(family):
    model = tiny.make(family)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.zero_()
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_threshold_0_changes_nothing_and_1_leaves_what_every_token_goes_to(family):
    model = tiny.make(family)
    with llmopt.attached(model, llmopt.experts.Skip(ratio=0), run=data()):
        nothing = logits(model)
    torch.testing.assert_close(nothing, logits(model), rtol=0, atol=1e-5)
    with gated(model, lambda layer, given: given.weights):
        assert torch.equal(logits(model), logits(tiny.make(family)))
    for score in ("modes", "router", "random"):
        with llmopt.attached(model, llmopt.experts.Skip(ratio=1, score=score, whole_layers=True), run=data()):
            torch.testing.assert_close(logits(model), logits(without_experts(family)), rtol=0, atol=1e-5)
    assert (logits(model) - logits(without_experts(family))).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_what_is_skipped_is_not_computed(implementation):
    config = Qwen3MoeConfig(**tiny.WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, index = torch.randn(6, 64), torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [0, 2], [1, 3]])
    weights = torch.rand(6, 2) + 0.1
    left = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [0, 1]]) * weights
    rows, operations = [], []
    with torch.no_grad(), gated(model, lambda layer, given: left if layer == 0 else given.weights):
        handle = experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with FlopCounterMode(display=False) as counter:
            found = experts(x, index, weights)
        operations.append(counter.get_total_flops())
        handle.remove()
    expected = torch.zeros(6, 64)
    for token, slot in left.nonzero().tolist():
        gate, up = (experts.gate_up_proj[index[token, slot]] @ x[token]).chunk(2)
        expected[token] += left[token, slot] * (experts.down_proj[index[token, slot]] @ (silu(gate) * up))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-3)
    assert rows == [6]                                          # pairs, of 12
    if implementation != "grouped_mm":                          # whose operations are not counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            experts(x, index, weights)
        assert operations[0] * 2 == counter.get_total_flops()


def test_the_share_that_is_skipped_grows_with_the_threshold_and_is_the_ratio():
    model, run = tiny.make("qwen3_moe"), data()
    for score in ("modes", "router", "random"):
        step = llmopt.experts.Skip(ratio=0.4, score=score, tokens=64, whole_layers=True)
        record = step.plan(model, run)
        assert abs(record.meta["skipped"] - 0.4) <= 0.02
        shares = []
        for threshold in (0.0, *(record.meta["threshold"] * part for part in (0.5, 1, 1.5)), 1.0):
            meta = record.meta | {"threshold": threshold}
            shares.append(skipped(model, run, run.batches, partial(step.left, Record(meta))))
        sums = [sum(one.values()) / 3 for one in shares]
        assert sums == sorted(sums) and sums[0] == 0 and sums[-1] == 1
        assert list(shares[2].values()) == pytest.approx(list(record.meta["by_layer"].values()))


def test_layers_are_weighed_by_what_the_predictions_lose_without_their_experts():
    model, run = tiny.make("qwen3_moe"), data(padded=9)
    real = run.batches[0]["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**run.batches[0]).logits[real].log_softmax(-1)
        losses = []
        for layer in range(3):
            cut = tiny.make("qwen3_moe")
            cut.model.layers[layer].mlp.experts.down_proj.data.zero_()
            there = cut(**run.batches[0]).logits[real].log_softmax(-1)
            losses.append(float((dense.exp() * (dense - there)).sum(-1).mean()))
    found = layer_weights(model, run, first_batches(run, 10))
    assert list(found.values()) == pytest.approx([one / sum(losses) for one in losses], rel=1e-3)
    assert sum(found.values()) == pytest.approx(1) and list(found) == [0, 1, 2]


def test_scores_by_hand():
    meta = {"threshold": 0.2, "layers": {"0": 0.5, "1": 1.0}}
    given = Routed(torch.randn(2, 4), torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.7, 0.3], [0.4, 0.1]]))
    step = llmopt.experts.Skip()
    assert step.kept(0, given, Record(meta)).tolist() == [[True, False], [True, False]]
    assert step.kept(1, given, Record(meta)).tolist() == [[True, True], [True, False]]
    assert step.left(Record(meta), 0, given).tolist() == [[pytest.approx(0.7), 0], [pytest.approx(0.4), 0]]
    raised = llmopt.experts.Skip(renormalize=True)
    assert raised.left(Record(meta), 0, given).tolist() == [[pytest.approx(1), 0], [pytest.approx(0.5), 0]]
    assert raised.left(Record(meta | {"threshold": 9.0}), 0, given).tolist() == [[0, 0], [0, 0]]


def test_lots_are_drawn_by_token_expert_layer_and_seed():
    given = Routed(torch.randn(500, 64), torch.tensor([[0, 1]] * 500), torch.full((500, 2), 0.5))
    meta = {"threshold": 0.25, "layers": {"0": 1.0, "1": 1.0}}
    step, other = llmopt.experts.Skip(score="random"), llmopt.experts.Skip(score="random", seed=1)
    kept = step.kept(0, given, Record(meta))
    assert 0.7 < kept.float().mean() < 0.8 and not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(step.kept(0, Routed(*(part[7:9] for part in given)), Record(meta)), kept[7:9])
    assert not torch.equal(step.kept(1, given, Record(meta)), kept)
    assert not torch.equal(other.kept(0, given, Record(meta)), kept)


def test_bisection_by_hand():
    thresholds = candidates(torch.tensor([0.1, 0.3, 0.2, 0.3]))
    assert thresholds == pytest.approx([0, 0.1, 0.2, 0.3, 1])
    shares = dict(zip(thresholds, (0, 0, 0.25, 0.5, 1), strict=True))
    for ratio, expected in ((0, 0.0), (0.2, 0.2), (0.25, 0.2), (0.4, 0.3), (0.6, 0.3), (0.9, 1.0)):
        assert bisected(shares.__getitem__, thresholds, ratio) == pytest.approx(expected)


def test_padding_is_in_no_figure_and_rows_are_alone():
    model = tiny.make("qwen3_moe")
    step = llmopt.experts.Skip(ratio=0.4, tokens=64)
    short = Run(batches=[{name: tensor[:, :23] for name, tensor in data(9).batches[0].items()}])
    padded, plain = step.plan(model, data(padded=9)).meta, step.plan(model, short).meta
    assert padded["threshold"] == pytest.approx(plain["threshold"], rel=1e-4)
    assert padded["by_layer"] == pytest.approx(plain["by_layer"])
    attach(model, step, Record(plain))
    ids = tiny.ids(2, 24, seed=4)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :7] = 0
    together = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(together[:1, 7:], logits(model, ids[:1, 7:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:], logits(model, ids[1:]), rtol=0, atol=1e-5)
    text = model.generate(ids[:1, 7:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(logits(model, text)[0, 16:-1].argmax(-1), text[0, 17:])
    twin = copy.deepcopy(model)
    detach(model)
    torch.testing.assert_close(logits(twin, ids[1:]), together[1:], rtol=0, atol=1e-5)
    assert not torch.equal(logits(model, ids[1:]), logits(twin, ids[1:]))


@pytest.mark.parametrize(("family", "fields", "error", "said"), [
    ("llama", {}, llmopt.LlmoptError, "its layers have no experts"),
    ("mixtral", {"ratio": 0.5, "score": "router"}, llmopt.LlmoptError, "ratio 0.5 is out of reach: .* skips is [01],"),
    ("qwen3_moe", {"ratio": 1}, llmopt.LlmoptError, "ratio: 1.0 given, less than 1, or whole_layers: true"),
    ("qwen3_moe", {"ratio": .9}, llmopt.LlmoptError, "layer [01]: all of its experts would be skipped for every tok")])
def test_bad_input_is_refused_by_name(family, fields, error, said):
    with pytest.raises(error, match=said):
        llmopt.experts.Skip(**fields).apply(tiny.make(family), data())
    with pytest.raises(llmopt.LlmoptError, match="calibration data and there is none"):
        llmopt.experts.Skip().apply(tiny.make("qwen3_moe"), Run())


def test_a_model_without_experts_is_refused_before_the_work():
    with pytest.raises(llmopt.LlmoptError, match=r"steps.0 experts.skip: llama: its layers have no experts"):
        predict(tiny.make("llama"), [llmopt.experts.Skip()])


@pytest.mark.parametrize("meta", [
    {"threshold": "x", "layers": {"0": 1.0, "1": 1.0, "2": 1.0}}, {"threshold": 0.1, "layers": {"0": 1.0}},
    {"threshold": float("nan"), "layers": {"0": 1.0, "1": 1.0, "2": 1.0}}, {"layers": {}}])
def test_a_forged_record_is_refused(meta):
    with pytest.raises(llmopt.LlmoptError, match="experts.skip"):
        llmopt.experts.Skip().restore(tiny.make("qwen3_moe"), Record(meta))


def test_one_method_of_experts_at_a_time():
    with (pytest.raises(llmopt.LlmoptError, match="at most one method that skips experts at a time"),
          llmopt.attached(tiny.make("qwen3_moe"), llmopt.experts.TopK(), llmopt.experts.TopK())):
        pass


KINDS = ["gpt_oss", "lfm2_moe", "ernie4_5_moe", "qwen3_next", "olmoe", "phimoe", "granitemoe", "minimax_m2", "dots1",
         "glm4_moe", "flex_olmo", "qwen3_5_moe_text", "jamba"]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if place < 3 else pytest.mark.full)
                                  for place, kind in enumerate(KINDS)])
def test_every_kind_of_experts_is_skipped_and_loaded_so(kind, tmp_path):
    model = tiny.make(kind)
    dense = logits(model)
    llmopt.compress(model, [llmopt.experts.Skip(ratio=0.33, whole_layers=True)], data().batches)
    fewer = logits(model)
    assert (fewer - dense).abs().max() > 1e-3
    llmopt.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(llmopt.load(tmp_path / "out")[0]), fewer, rtol=0, atol=1e-5)
    detach(model)
    assert torch.equal(logits(model), dense)
