"""What a dry run says of memory and time is what a run takes; it really works, on one block, and leaves nothing."""
import json
import subprocess
import sys
import time

import psutil
import pytest
import torch
from llmopt_evals.synthetic import write
from transformers import LlamaConfig

import llmopt
from llmopt import progress, recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.forecast.memory import Peak, advice
from llmopt.progress import Clock
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from llmopt.scale.gauge import Gauge, taken
from tests import tiny
from tests.command import llmopt as command
from tests.test_contract import FIELDS

ROWS = tiny.ids(16, 96).tolist()


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A folder with a model of one block whose Hessians are what counts, and calibration rows."""
    folder = tmp_path_factory.mktemp("middling")
    write(LlamaConfig(vocab_size=4000, hidden_size=512, intermediate_size=3072, num_hidden_layers=1,
                      num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512), folder / "model")
    (folder / "ids.jsonl").write_text("\n".join(map(str, ROWS)))
    (folder / "r.yaml").write_text(f"model: {{id: {folder / 'model'}}}\ndata: {{name: ids, path: {folder / 'ids.jsonl'}"
                                   "}\nsteps: [quant.gptq: {bits: 4, clip: false}]\n")
    return folder


@pytest.mark.full          # it measures a process
@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_memory_is_what_was_predicted(way, middling, tmp_path):
    run = command("compress", "--recipe", middling / "r.yaml", "--output", tmp_path / "out", way, "--json")
    assert run.returncode == 0, run.stderr
    predicted, measured = json.loads(run.stdout)["predictions"]["memory"]
    assert predicted == pytest.approx(measured, rel=0.25)
    assert predicted == dry_run(recipe.load(str(middling / "r.yaml")), Streaming(way == "--stream"))["predicted_memory"]
    assert f"memory: {predicted:,} predicted, {measured:,} measured" in (tmp_path / "out/llmopt.log").read_text()
    assert "predictions" not in (tmp_path / "out/llmopt.json").read_text()


def test_a_gauge_sees_what_comes_and_goes():
    with Gauge() as gauge:
        before = taken(psutil.Process())
        block = torch.ones(50_000_000)
        time.sleep(0.2)
        del block
        assert abs(gauge.look().private - 200_000_000) < 20_000_000
        assert taken(psutil.Process()).private - before.private < 20_000_000


def test_large_tensors_lie_on_pages_of_their_own():
    """torch reads the setting when it makes its first tensor: importing llmopt must not make one."""
    code = ("import llmopt.cli; from llmopt.scale.gauge import whole_pages; whole_pages(); import torch; "
            "print([torch.ones(n).data_ptr() % 4096 for n in (2**20, 2**22)])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[0, 0]\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("lasts", "seconds"), [([3, 9, 9, 9], 12), ([5], 5), ([], 0)])
def test_the_first_item_foretells_its_loop(clock, lasts, seconds):
    pace = Clock()
    for last in pace(lasts, "items"):
        clock[0] += last
    assert pace.seconds == seconds


STEPS = ("[heads.gradient: {}, prune.magnitude: {ratio: 0.3, units: [ffn], refit: true}, "
         "quant.gptq: {bits: 3.5, group_size: 8, allocate: lim}, kv.snapkv: {ratio: 0.5, window: 8}]")
CASES = [*((family, STEPS) for family in ("llama", "gemma3_text", "phi3", "gpt2")),
         *((family, "[quant.rtn: {group_size: 8}]") for family in ("mixtral", "qwen2_moe")),
         *(("llama", f"[prune.magnitude: {{ratio: 0.4, units: [{unit}], scope: {scope}}}]") for unit, scope in
           (("blocks", "local"), ("attention, mlp", "local"), ("ffn", "global"))),
         *(("llama", f"[{{{name}: {json.dumps(FIELDS.get(name, {}))}}}]") for name in llmopt.names())]


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_a_dry_run_works_on_one_block_and_leaves_nothing(family, steps, tmp_path, monkeypatch):
    model = checkpoint.save(tiny.make(family), tmp_path / "model", max_shard_size="60KB")
    (tmp_path / "ids.jsonl").write_text("\n".join(map(str, tiny.ids(8, 24).tolist())))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    plan = recipe.parse(f"model: {{id: {model}}}\ndata: {{name: ids, path: {tmp_path / 'ids.jsonl'}}}\n"
                        f"format: {'dense' if family == 'gpt2' else 'portable'}\nsteps: {steps}\n", "test.yaml")
    for streamed in {False, not any(step.needs_whole for step in plan.steps)}:
        told = dry_run(plan, Streaming(streamed))
        done = [part for part, _, seconds, _ in told["seconds"] if part.startswith("steps.") and seconds > 0]
        assert len(done) == sum(step.stage != "runtime" for step in plan.steps)
        assert told["predicted_seconds"] == pytest.approx([sum(part[which] for part in told["seconds"])
                                                           for which in (1, 2)])
        assert told["predicted_seconds"][0] <= told["predicted_seconds"][1]
        assert told["predicted_memory"] == max(private for _, private in told["peaks"])
    assert list(scratch.iterdir()) == []


def test_too_little_memory_is_said_with_what_helps():
    told = Peak("steps.0 quant.gptq", 5 * 10**9)
    assert advice(told, 5 * 10**9, streamed=False, batches=True) == []
    said, = advice(told, 4 * 10**9, streamed=False, batches=True)
    assert said == ("steps.0 quant.gptq will take 5.0 GB, 4.0 GB are available; what helps: --stream, fewer "
                    "data.samples, a smaller data.batch_size or data.length, a machine with more memory")
    assert "--activation-memory" in advice(told, 4 * 10**9, streamed=True, batches=False)[0]
