"""Models that no table describes, quantized: what was found is what is written, and plain transformers reads it."""
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmopt
from llmopt.errors import LlmoptError
from llmopt.model.architectures import SPECS
from llmopt.model.blocks import blocks
from llmopt.parts import build
from llmopt.run import pipeline
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from tests import odd as shapes
from tests import tiny
from tests.plans import contents, dense, plan

UNKNOWN = [kind for kind in tiny.MORE if kind not in SPECS]
# what compressed-tensors, or its loader, cannot hold
DENSE = ("gpt_oss", "granitemoe", "granitemoeshared")
WAYS = {"rtn": {"bits": 3, "group_size": 16}, "gptq": {"bits": 4, "group_size": 16, "sweeps": 0}}
BYTES = 0.01                                            # of a checkpoint: the headers of its shards


def pairs(every, ways=tuple(WAYS)):
    """(kind, way): every so many kinds one way in the quick tier, the ways in turn; all in the full one."""
    return [pytest.param(kind, way, marks=[] if (i % every, i // every % len(ways)) == (0, j) else pytest.mark.full)
            for i, kind in enumerate(UNKNOWN) for j, way in enumerate(ways)]


@pytest.mark.parametrize(("kind", "way"), pairs(3))
def test_quantized_and_loaded_again(kind, way, tmp_path):
    model, ids = tiny.make(kind), tiny.ids(4, 24)
    before = model(ids, use_cache=False).logits
    report = llmopt.compress(model, [build(f"quant.{way}", WAYS[way])], batches=ids)
    after = model(ids, use_cache=False).logits
    assert set(report.records[0]["meta"]["modules"]) == {p.name for block in blocks(model) for group in block.weights()
                                                         for p in group}
    assert torch.isfinite(after).all() and not torch.allclose(after, before, atol=1e-3)
    llmopt.save(model, tmp_path / "out", format="dense" if kind in DENSE else "portable")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(fresh(ids, use_cache=False).logits, after)


@pytest.mark.parametrize(("kind", "way"), pairs(12))
def test_streamed_they_are_the_bytes_of_a_run_in_memory(kind, way, tmp_path):
    step = f"[quant.{way}: {json.dumps(WAYS[way])}]"
    made = plan(tmp_path, dense(tmp_path, kind), step, "format: dense\n" if kind in DENSE else "")
    for name, force in (("memory", False), ("streamed", True)):
        report = pipeline.run(made, tmp_path / name, streaming=Streaming(force, activations=1 << 14))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")
    written = sum(file.stat().st_size for file in (tmp_path / "memory").glob("*.safetensors"))
    assert kind in DENSE or report.predicted_bytes == pytest.approx(written, rel=BYTES)


QUICK = (("gemma3n_text", False), ("lfm2", False), ("nemotron_h", True), ("olmo_hybrid", True))


@pytest.mark.parametrize(("kind", "streamed"), [
    pytest.param(kind, streamed, marks=[] if (kind, streamed) in QUICK else pytest.mark.full)
    for kind in dict.fromkeys([*UNKNOWN, *dict(QUICK)]) for streamed in (False, True)])
def test_a_dry_run_foretells_them_where_one_block_alone_makes_no_model(kind, streamed, tmp_path):
    made = plan(tmp_path, dense(tmp_path, kind), "[quant.rtn: {group_size: 16}]", "format: dense\n")
    told = dry_run(made, Streaming(streamed))
    report = pipeline.run(made, tmp_path / "out", streaming=Streaming(streamed))
    assert told["predicted_bytes"] == report.predicted_bytes == pytest.approx(report.size, rel=BYTES)
    assert {"load", "steps.0 quant.rtn", "save and verify"} <= {part for part, *_ in told["seconds"]}


def odd(**changes):
    """A model of tests/odd.py with weights large enough that all parts matter."""
    shapes.register()
    torch.manual_seed(0)
    model = shapes.OddForCausalLM(shapes.OddConfig(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.12)
    return model


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_of_nobodys_is_quantized_and_loaded_again(streamed, tmp_path):
    model, ids = odd(), tiny.ids(4, 24)
    model.save_pretrained(tmp_path / "dense")
    made = plan(tmp_path, tmp_path / "dense", f"[quant.gptq: {json.dumps(WAYS['gptq'])}]")
    report = pipeline.run(made, tmp_path / "out", streaming=Streaming(streamed))
    names = {name.removeprefix("trunk.stages.") for name in report.records[0]["meta"]["modules"]}
    pair = {f"{i}.mixer.pair.{name}" for i in range(3) for name in ("ask", "answer")}
    assert names == pair | {f"{i}.deep.{place}" for i in (0, 2) for place in ("1.0", "2")}
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    found = fresh(ids).logits
    assert not torch.equal(found, model(ids).logits)
    assert torch.nn.functional.cosine_similarity(found.flatten(), model(ids).logits.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(("changes", "expected"), [
    ({"handed_on": True}, "trunk.stages.1 is given what earlier layers made beside the hidden state (before)"),
    ({"twins": True}, "trunk.stages and trunk.others could both be its decoder layers")])
def test_or_refused_in_a_line_that_says_what_is_missing(changes, expected):
    with pytest.raises(LlmoptError, match=re.escape(f"architecture 'odd' is not supported: {expected}")):
        llmopt.compress(odd(**changes), [build("quant.rtn", WAYS["rtn"])])
