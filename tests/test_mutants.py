"""Lines of the core that once could be changed without a test noticing: one truth for each."""
from typing import ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from transformers import LlamaConfig, PreTrainedTokenizerFast

import llmopt
from llmopt import kv, runtime
from llmopt.calibration import data
from llmopt.calibration.inputs import Moments
from llmopt.calibration.walk import visits
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.prune.allocate import Units, globally
from llmopt.quant import GPTQ
from llmopt.quant.grid import Spec, fit_groups
from llmopt.run import pipeline
from llmopt.specs import DataSpec
from llmopt.transform.base import Transform
from tests import tiny
from tests.quant.quant_data import batches
from tests.quant.test_gptq import brute_force, correlated


def test_act_order_takes_the_largest_inputs_first():
    """On inputs whose channels share most of their variance the order decides."""
    weight, moments, _ = correlated()
    step, spec = GPTQ(damping=0.0, signed=False, search="weights", sweeps=0), Spec(3)
    order = moments.hessian.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(24)) and torch.equal(step.prepare(moments).order, order)
    solved = step.quantize(weight.clone(), moments, spec)
    scale = fit_groups(weight, spec)[0][:, 0].double()
    expected = torch.empty_like(weight)
    expected[:, order] = brute_force(weight[:, order], moments.hessian[order][:, order], scale, 3).float()
    same = (solved.dequantize(torch.float32) - expected).abs().amax(1) < 1e-5
    assert int((~same).sum()) == solved.figures["rounded_rows"] < 4


def test_the_output_error_of_a_record_is_that_of_the_outputs():
    dense, model, seen = tiny.make("llama"), tiny.make("llama"), []
    report = llmopt.compress(model, [GPTQ(bits=3, group_size=16)], batches=batches())
    for visit in visits(dense, Run(batches()), "x", edits=False):
        name = visit.block.attn_in[0].name
        visit.observe({name: seen.append})
        break
    x, before = torch.cat(seen), blocks(dense)[0].attn_in[0].weight
    after = blocks(model)[0].attn_in[0].weight
    expected = float((x @ (after - before).T).square().sum() / (x @ before.T).square().sum())
    assert report.records[0]["meta"]["modules"][name]["output_error"] == pytest.approx(expected, rel=1e-3)


def test_a_token_of_weight_nothing_is_as_good_as_absent():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    weighted, dropped = Moments(), Moments()
    weighted.add(x, (torch.arange(40) % 2 == 0).float())
    dropped.add(x[::2])
    torch.testing.assert_close(weighted.hessian * 40, dropped.hessian * 20)


@dataclass(frozen=True)
class Noise(Transform):
    """Adds noise that it draws from torch's own generator: a step that would not repeat without a seed."""

    name: ClassVar = "transform.noise"

    def apply(self, model, run: Run) -> Record:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.01)
        return Record()


def test_every_step_draws_from_the_runs_seed():
    """Whatever ran before: a resumed run passes over the work of earlier steps."""
    alone, behind, other = (tiny.make("llama") for _ in range(3))
    pipeline.apply_steps(alone, [Noise()], Run(seed=5))
    torch.randn(100)
    pipeline.apply_steps(behind, [Noise()], Run(seed=5))
    pipeline.apply_steps(other, [Noise()], Run(seed=6))
    one, two, three = (model.state_dict()["model.norm.weight"] for model in (alone, behind, other))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_a_later_turn_has_budgets_of_its_own():
    """The first turn is short enough to keep all; pyramid's budgets of the second follow its own length."""
    model, method = tiny.make("llama"), kv.SnapKV(budget=16, window=4, allocate="pyramid")
    ids = tiny.ids(1, 72)
    with runtime.attached(model, method):
        cache = model(ids[:, :12], use_cache=True).past_key_values
        assert [layer.counts().unique().tolist() for layer in cache.layers] == [[12]] * 3
        model(ids[:, 12:], past_key_values=cache)
        held = torch.stack([layer.counts() for layer in cache.layers])
        alone = model(ids, use_cache=True).past_key_values
    assert int(held.sum()) == 3 * 2 * 16
    assert torch.equal(held, torch.stack([layer.counts() for layer in alone.layers]))


def test_a_layer_that_cannot_pay_its_next_chunk_loses_no_later_one():
    """Chunks of 28, then 4 units: 20 pay for the second, which may not leave before the first."""
    wide = Units(0, "ffn", torch.arange(1.0, 37.0), 1, (36, 32, 4), torch.arange(36)[:, None])
    stepped = Units(1, "ffn", torch.tensor([0.5] * 28 + [9.0] * 8), 1, (36, 8, 4), torch.arange(36)[:, None])
    assert globally([wide, stepped], 20 / 72) == [4, 0]


def test_bos_stands_in_front_where_the_tokenizer_adds_none(tmp_path):
    from llmopt_evals.world.tokenizer import build_tokenizer

    words = build_tokenizer()
    plain = words.backend_tokenizer
    plain.post_processor = None
    bare = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=words.bos_token, pad_token=words.pad_token)
    assert bare("the fox").input_ids[0] != bare.bos_token_id
    (tmp_path / "t.txt").write_text("the fox runs . " * 12)
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=128)
    batch, = data.load(DataSpec(name="text", path=str(tmp_path / "t.txt")), config, bare)
    assert batch["input_ids"][0, :2].tolist() == [bare.bos_token_id, *bare("the").input_ids]
