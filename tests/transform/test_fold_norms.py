"""transform.fold_norms through its base: streamed, cut off and resumed, predicted, refused, the record."""
import pytest
import torch

from llmopt import recipe
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.outside import Outside
from llmopt.quant import RTN
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from llmopt.scale.journal import Interrupted
from llmopt.transform import FoldNorms
from tests import tiny
from tests.plans import contents, dense, plan

STEPS = ("[prune.magnitude: {ratio: 0.3, units: [ffn], refit: false}, transform.fold_norms: {}, "
         "quant.rtn: {bits: 4, group_size: 16}, kv.snapkv: {ratio: 0.5, window: 8}]")


@pytest.mark.parametrize(("family", "format"), [("llama", "portable"), ("gpt2", "dense"), ("gemma2", "portable")])
def test_streamed_is_in_memory(family, format, tmp_path):
    """Tied heads: what a streamed run unties is written, and loads again."""
    made = plan(tmp_path, dense(tmp_path, family, norms=True), STEPS, f"format: {format}\n")
    for name, force in (("memory", False), ("streamed", True)):
        pipeline.run(made, tmp_path / name, streaming=Streaming(force))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")
    fresh, _ = load(tmp_path / "memory")
    assert not fresh.config.tie_word_embeddings
    assert not torch.equal(fresh.get_output_embeddings().weight, fresh.get_input_embeddings().weight)


def cut_off(patch, cls: type, name: str, at: int) -> None:
    """Ctrl-C when a method has done its work for the `at`-th time, forecasts left out."""
    work, left = getattr(cls, name), [at]

    def cut(self, *args):
        found = work(self, *args)
        left[0] -= not is_forecast(args)
        if left[0] == 0:
            raise KeyboardInterrupt
        return found

    patch.setattr(cls, name, cut)


def is_forecast(args: tuple) -> bool:
    return isinstance(args[0], Outside) and args[0].embeddings.weight.is_meta


@pytest.mark.parametrize("streamed", [(False, False, False), (True, True, True), (False, True, False)])
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(streamed, tmp_path, monkeypatch):
    """In the second block, then around the blocks, then behind it all; in memory, streamed, from one to the other."""
    made = plan(tmp_path, dense(tmp_path, "llama", norms=True), STEPS)
    pipeline.run(made, tmp_path / "whole", streaming=Streaming(False))
    cuts = [(FoldNorms, "block", 2), (FoldNorms, "outside", 1), (RTN, "quantize", 9)]
    for stream, (cls, name, at) in zip(streamed, cuts, strict=True):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            cut_off(patch, cls, name, at)
            pipeline.run(made, tmp_path / "out", streaming=Streaming(stream), resume=True)
    done = []
    monkeypatch.setattr(FoldNorms, "block", lambda self, *args: done.append(args) or {})
    monkeypatch.setattr(FoldNorms, "outside", lambda self, rest: rest.untie() if is_forecast((rest,)) else
                        done.append(rest))
    pipeline.run(made, tmp_path / "out", streaming=Streaming(streamed[0]), resume=True)
    assert not done                                    # all of the transform was finished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_record_says_what_was_folded():
    model = tiny.make("gemma2", norms=True)
    record = FoldNorms().apply(model, Run())
    assert record.meta["blocks"] == [{"folded": ["attn_in", "ffn_in"]}] * 3
    before, after = record.meta["parameters"]
    assert after - before == model.get_output_embeddings().weight.numel()
    assert all(norm.gain.sub(1).abs().max() > .1 for norm in blocks(model)[0].norms.values() if "out" in norm.role)


def test_without_the_head_the_tie_and_the_final_norm_stay():
    model = tiny.make("llama", norms=True)
    final = model.model.norm.weight.clone()
    record = FoldNorms(head=False).apply(model, Run())
    assert model.config.tie_word_embeddings and torch.equal(model.model.norm.weight, final)
    assert record.meta["parameters"][0] == record.meta["parameters"][1]


def test_an_architecture_that_cannot_is_refused_before_the_work():
    with pytest.raises(LlmoptError, match="olmo2: norms cannot be folded: its norms stand behind the writers"):
        predict(tiny.make("olmo2"), [FoldNorms()])


@pytest.mark.parametrize(("steps", "said"), [
    ("[quant.rtn: {}, transform.fold_norms: {}]", "transform.fold_norms must come before quant.rtn"),
    ("[transform.fold_norms: {}, prune.magnitude: {}]", "prune.magnitude must come before transform.fold_norms")])
def test_a_transform_stands_between_pruning_and_quantization(steps, said):
    with pytest.raises(LlmoptError, match=f"{said}: the order is score -> prune -> transform -> quant -> runtime"):
        recipe.parse(f"steps: {steps}", "r.yaml")


@torch.no_grad()
def test_a_head_tied_by_hand_is_untied_too():
    """The config says nothing of the tie; folded into the common table the gain would reach the embeddings."""
    model = tiny.make("qwen3", norms=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    before, table = model(tiny.ids()).logits, model.model.embed_tokens.weight.clone()
    FoldNorms().apply(model, Run())
    torch.testing.assert_close(model(tiny.ids()).logits, before, rtol=0, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, table)


def test_a_tie_that_stays_is_streamed_as_a_tie(tmp_path):
    steps = "[transform.fold_norms: {head: false}, quant.rtn: {bits: 4, group_size: 16}]"
    made = plan(tmp_path, dense(tmp_path, "llama", norms=True), steps)
    for name, force in (("memory", False), ("streamed", True)):
        pipeline.run(made, tmp_path / name, streaming=Streaming(force))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")
    assert load(tmp_path / "streamed")[0].config.tie_word_embeddings
