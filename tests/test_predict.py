"""What `--dry-run` says of a size is what is written."""
import random

import pytest
import torch
from safetensors.torch import save_file

import llmopt
from llmopt import recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.forecast.size import predict
from llmopt.model.blocks import blocks
from llmopt.prune import Magnitude
from llmopt.quant import RTN
from llmopt.run import pipeline
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from llmopt.transform import FoldNorms
from tests import tiny

BLOCKS = Magnitude(ratio=0.34, units=["blocks"])
NARROW = Magnitude(ratio=0.3, units=["ffn"], refit=False)


@pytest.mark.parametrize(("family", "steps", "format"), [
    ("qwen3", [BLOCKS, NARROW, RTN(bits=3, group_size=16)], "portable"),
    ("phi3", [NARROW, Magnitude(ratio=0.5, units=["kv_groups"], refit=False), RTN(bits=4, group_size=-1)], "portable"),
    ("mixtral", [RTN(bits=2, group_size=1)], "portable"),
    ("llama", [NARROW, FoldNorms(), RTN(bits=2, group_size=1)], "portable"),
    ("opt", [FoldNorms()], "dense"),
    ("gpt2", [NARROW, BLOCKS, RTN(bits=2, group_size=4)], "dense"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_predicted_bytes_are_the_written_ones(family, steps, format, tmp_path):
    model = tiny.make(family)
    told = predict(model, steps, format)
    assert len(told.steps) == len(steps)
    llmopt.compress(model, steps)
    llmopt.save(model, tmp_path / "out", format=format)
    assert told.bytes == shards.written_bytes(tmp_path / "out")


@pytest.mark.parametrize("stream", [False, True])
def test_the_headers_of_several_files_are_foretold(stream, tmp_path):
    model = checkpoint.save(tiny.make("llama"), tmp_path / "model")
    text = f"model: {{id: {model}}}\nsteps: [quant.rtn: {{group_size: 16}}]\nmax_shard_size: 20KB\n"
    plan, streaming = recipe.parse(text, "r.yaml"), Streaming(stream)
    report = pipeline.run(plan, tmp_path / "out", streaming=streaming)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    assert dry_run(plan, streaming)["predicted_bytes"] == report.predicted_bytes == report.size


def test_a_second_global_step_is_predicted_within_a_few_percent(tmp_path):
    steps = [BLOCKS, Magnitude(ratio=0.3, scope="global", refit=False), RTN(bits=4, group_size=16)]
    model = tiny.make("llama")
    told = predict(model, steps)
    assert "removes about" in told.steps[1][1]
    llmopt.compress(model, steps)
    llmopt.save(model, tmp_path / "out")
    assert told.bytes == pytest.approx(shards.written_bytes(tmp_path / "out"), rel=0.05)


def test_what_the_architecture_cannot_lose_is_refused_before_the_work():
    model = tiny.make("opt")
    for projection in blocks(model)[0].ffn_in:
        projection.write(projection.weight * 0.01)              # its first choice would be a part that cannot leave
    with pytest.raises(LlmoptError, match="steps.0 prune.magnitude: opt: mlp cannot be pruned"):
        predict(model, [Magnitude(ratio=0.25, units=["attention", "mlp"])])


def test_the_size_of_a_file_is_known_for_every_dtype(tmp_path):
    dtypes = [getattr(torch, name.removeprefix("torch.")) for name in shards.DTYPES]
    pick, file = random.Random(0), tmp_path / "t.safetensors"
    for _ in range(40):                                     # the header's length depends on the order of the tensors
        tensors = {f"{'x' * pick.randrange(9)}{i}": torch.zeros(pick.randrange(200), dtype=pick.choice(dtypes))
                   for i in range(20)}
        save_file(tensors, file, metadata=shards.METADATA)
        assert shards.file_bytes(tensors) == file.stat().st_size


def test_a_plan_that_was_made_to_foretell_the_size_is_the_one_that_is_carried_out(tmp_path, monkeypatch):
    scored, plain = [], Magnitude.score
    monkeypatch.setattr(Magnitude, "score", lambda *args: (scored.append(1), plain(*args))[1])
    model = checkpoint.save(tiny.make("llama"), tmp_path / "model")
    text = f"model: {{id: {model}}}\nsteps: [prune.magnitude: {{scope: global, units: [ffn], refit: false}}]\n"
    report = pipeline.run(recipe.parse(text, "r.yaml"), tmp_path / "out")
    assert len(scored) == 3                                     # blocks
    assert report.predicted_bytes == shards.written_bytes(tmp_path / "out")


@pytest.mark.parametrize(("family", "step", "says"), [
    ("llama", RTN(group_size=16, symmetric=False, bits=3.5, allocate="zd"), "alike in bits"),
    ("llama", RTN(scheme="FP8_BLOCK"), "q_proj: its 64 input features are no multiple of 128, as scheme FP8_BLOCK"),
    ("llama", RTN(scheme="NVFP4"), "nvfp4 as bfloat16, and the model is float32: give dtype: bfloat16"),
    ("gpt2", RTN(group_size=16), "Conv1D")])
def test_what_the_format_cannot_hold_is_refused_before_the_work(family, step, says):
    with pytest.raises(LlmoptError, match=says):
        predict(tiny.make(family), [step])
