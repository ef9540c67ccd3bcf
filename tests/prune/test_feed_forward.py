"""Channels of feed-forward parts that have an entry where the rest of their layers has none."""
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmopt
from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Magnitude, Wanda
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from tests import seeing, tiny, warm
from tests.command import ROOT, command
from tests.plans import contents, dense, plan

TEXT, SEEING = ("qwen3_5_text", "gemma4_text"), ("qwen3_5", "gemma4", "gemma3")
MORE = [pytest.param(kind, marks=pytest.mark.full) for kind in (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "paligemma", "internvl")]


def made(kind):
    return tiny.make(kind) if kind in TEXT else seeing.make(kind)


@pytest.mark.parametrize("kind", [*TEXT, *SEEING, *MORE])
def test_the_channels_that_leave_are_what_the_model_loses(kind, tmp_path):
    """As the dense model whose writers read nothing from them; read back exactly, with the width in the config."""
    model, like, ids = made(kind), made(kind), torch.randint(3, 90, (2, 20))
    kept = [torch.randperm(96, generator=torch.Generator().manual_seed(i))[:70].sort().values for i in range(3)]
    apply_plan(model, [LayerPlan(ffn=some) for some in kept], Run())
    for block, some in zip(blocks(like), kept, strict=True):
        block.ffn_out.weight.data[:, [i not in some for i in range(96)]] = 0
    torch.testing.assert_close(model(ids).logits, like(ids).logits, atol=1e-5, rtol=1e-5)
    llmopt.save(model, tmp_path / "out")
    fresh, _ = load(tmp_path / "out")
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert {block.width for block in blocks(fresh)} == {fresh.config.get_text_config().intermediate_size} == {70}


def test_widths_by_layer_of_a_hybrid_are_for_those_who_know_them(tmp_path):
    """Stock transformers refuses the folder; its own code, trusted, and llmopt load it exactly."""
    model = tiny.make("qwen3_5_text")
    llmopt.compress(model, [Wanda(ratio=0.3, units=["ffn"], scope="global"), llmopt.quant.RTN(bits=8, group_size=-1)],
                    batches=tiny.ids())
    assert len({block.width for block in blocks(model)}) > 1
    llmopt.save(model, tmp_path / "out")
    done = warm.run(ROOT / "tests" / "load_many.py", "plain,trust", tmp_path / "r.pt", tmp_path / "out",
                    env=command()[1])
    assert not done.returncode, done.stderr
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))       # as in load_many.py
    plain, trusted = (found[str(tmp_path / "out")] for found in torch.load(tmp_path / "r.pt").values())
    assert "error" in plain and torch.equal(trusted["logits"], model(ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)


def test_streamed_and_by_a_plan_it_is_the_same(tmp_path):
    steps = "[prune.wanda: {ratio: 0.3, units: [ffn]}, quant.gptq: {bits: 4, group_size: -1, clip: false}]"
    recipe = plan(tmp_path, dense(tmp_path, "qwen3_5_text"), steps)
    for streamed in (False, True):
        pipeline.run(recipe, tmp_path / f"{streamed}", streaming=Streaming(streamed))
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    model = tiny.make("qwen3_5_text")
    llmopt.compress(model, [llmopt.prune.ByPlan(path=str(tmp_path / "True"))], batches=tiny.ids())
    assert [block.width for block in blocks(model)] == [block.width for block in blocks(load(tmp_path / "True")[0])]


@pytest.mark.parametrize(("kind", "fields", "said"), [
    ("gemma4_text", {"units": ["ffn"], "scope": "global"}, "per_layer_shapes cannot be stored: its config keeps"),
    ("qwen3_5", {"units": ["ffn"], "scope": "global"}, "per_layer_shapes cannot be stored: its config keeps"),
    ("gemma3", {}, "kv_groups cannot be pruned: of its layers a table knows the feed-forward part alone"),
    ("qwen3_5_moe", {"units": ["ffn"]}, "ffn cannot be pruned: of its layers a table knows the heads alone")])
def test_what_else_would_leave_is_refused_by_name(kind, fields, said):
    model, ids = made(kind), torch.randint(3, 90, (2, 20))
    before = model(ids).logits
    with pytest.raises(LlmoptError, match=f"{kind}: .*{said}"):
        llmopt.compress(model, [Magnitude(ratio=0.3, **fields)], batches=ids)
    assert torch.equal(model(ids).logits, before)
