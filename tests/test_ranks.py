"""Two processes give what one gives, share the work, and end together."""
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llmopt import recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.run import pipeline
from llmopt.scale.processes import Ranks
from tests import tiny, warm
from tests.command import ROOT, command, torchrun

STEPS = ("[heads.span: {}, prune.magnitude: {ratio: 0.2, units: [ffn]}, "
         "quant.gptq: {bits: 3, group_size: 16, allocate: lim, clip: false, sweeps: 0}, "
         "kv.snapkv: {ratio: 0.5, window: 8}]")


def prepare(folder: Path, steps: str = STEPS, **changes) -> Path:
    """A recipe over a tiny model and nine rows of data."""
    checkpoint.save(tiny.make("llama", **changes), folder / "dense", max_shard_size="60KB")
    rows = tiny.ids(9, 24).tolist()
    rows[3] = rows[3][:17]
    (folder / "ids.jsonl").write_text("\n".join(map(str, rows)))
    file = folder / "r.yaml"
    file.write_text(f"model: {{id: {folder / 'dense'}}}\ndata: {{name: ids, path: {folder / 'ids.jsonl'}, "
                    f"batch_size: 3}}\nsteps: {steps}\n")
    return file


def launch(*words: str) -> subprocess.Popen:
    line, variables = torchrun(*words)
    return subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def run(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of two processes."""
    process = launch(*words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def warm_pair(*words: str) -> tuple[int, str, str]:
    """Two warm processes, told what torchrun tells; nothing of torchrun itself: how runs end is not its business."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        variables = command(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))[1]
    pair = [warm.start(*words, env=variables | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT) for rank in "01"]
    (out, err), (nothing, other) = [process.communicate() for process in pair]
    return pair[0].returncode or pair[1].returncode, out + nothing, err + other


def told(err: str) -> list[str]:
    """What the command itself said."""
    return [line for line in err.splitlines() if line.startswith(("error:", "interrupted"))]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_every_row_is_one_ranks_own(size):
    ids = torch.arange(22).view(11, 2)
    batches = [{"input_ids": part, "attention_mask": part} for part in ids.split(4)]
    shares = [Ranks(rank, size).share_batches(batches) for rank in range(size)]
    assert torch.equal(torch.cat([batch["input_ids"] for share in shares for batch in share]), ids)
    assert all(torch.equal(batch["input_ids"], batch["attention_mask"]) for share in shares for batch in share)
    counts = [len(Ranks(rank, size).share(range(11))) for rank in range(size)]
    assert sum(counts) == 11 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("words", [[], pytest.param(["--all"], marks=pytest.mark.full)])
def test_two_processes_compute_what_one_does(words):
    code, out, err = warm_pair("tests/ranks_many.py", *words)
    assert code == 0, err
    found = json.loads(out)
    assert len(found) >= 12 and not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_files_are_those_of_one_process(stream, tmp_path):
    steps = STEPS.replace("heads.span: {}, ", "") if stream else STEPS
    file, words = prepare(tmp_path, steps), ["--json", "--no-eval", "--activation-memory", "20KB"]
    code, out, err = warm_pair("-m", "llmopt", "compress", "--recipe", file, "--output", tmp_path / "two", *words,
                               *["--stream"] * stream)
    assert code == 0 and not told(err), err
    assert json.loads(out)["table"]                       # one process alone talks
    pipeline.run(recipe.load(str(file)), tmp_path / "one")
    own = {"llmopt.log", "llmopt.json", "README.md"}      # these also hold the table at the end of the command
    names = [{path.name for path in (tmp_path / which).iterdir()} for which in ("one", "two")]
    assert names[0] == names[1]
    for name in names[0] - own:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    records = [json.loads((tmp_path / which / "llmopt.json").read_text())["records"] for which in ("one", "two")]
    assert [r["method"] for r in records[0]] == [r["method"] for r in records[1]]
    assert not list(tmp_path.glob("*llmopt-*"))


def kill(process: subprocess.Popen, rank: int | None, number: signal.Signals) -> None:
    """Send a signal to one of the processes, or to the launcher."""
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    (process if rank is None else ranks[str(rank)]).send_signal(number)


@pytest.mark.parametrize(("rank", "number"), [
    (1, signal.SIGKILL), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (0, signal.SIGKILL), (1, signal.SIGINT), (None, signal.SIGINT), (None, signal.SIGTERM)))])
def test_a_process_that_dies_ends_the_run(rank, number, tmp_path):
    steps = STEPS.replace("heads.span: {}, ", "")
    file = prepare(tmp_path, steps, hidden_size=256, intermediate_size=1024)
    process = launch("-m", "llmopt", "compress", "--recipe", file, "--output", tmp_path / "out", "--stream")
    deadline = time.monotonic() + 150
    while not (tmp_path / "out.llmopt-work" / "step-0").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill(process, rank, number)
    start = time.monotonic()
    out, err = process.communicate(timeout=100)
    assert time.monotonic() - start < 60
    assert process.returncode != 0 and not out and len(told(err)) <= 1, err
    assert str(ROOT / "llmopt") not in err                # torchrun shows its own calls, never ours
    assert leftovers(tmp_path) in ([], ["out.llmopt-work"])
    for name in ("out", "one"):                           # one process goes on where two were cut off
        pipeline.run(recipe.load(str(file)), tmp_path / name, resume=True)
    weights = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
               for name in ("out", "one")]
    assert weights[0] == weights[1]


FAILING = """
import sys, time
from llmopt.scale import processes
from llmopt.errors import LlmoptError
from llmopt.cli import commands

@commands.cli.command()
def fail():
    team = processes.join()
    team.wait()
    if not team.is_main:
        raise LlmoptError("the disk is gone")
    team.wait()


commands.SHARED += ("fail",)
sys.argv = ["llmopt", "fail"]
commands.main()
"""


@pytest.mark.full
def test_the_error_of_one_process_is_told_once(tmp_path):
    (tmp_path / "fail.py").write_text(FAILING)
    code, out, err = run(tmp_path / "fail.py")
    assert code != 0 and told(err) == ["error: the disk is gone"] and "another process" not in err


@pytest.mark.full
def test_bad_input_is_told_once(tmp_path):
    file = prepare(tmp_path, "[quant.rtn: {bits: 1}]")
    code, out, err = run("-m", "llmopt", "compress", "--recipe", file, "--output", tmp_path / "out")
    assert code != 0 and not out and not leftovers(tmp_path)
    line, = told(err)
    assert "bits: 1 given" in line


def test_accelerate_launch_that_starts_one_process_is_told():
    _, variables = command()
    found = warm.run("-m", "llmopt", "methods", "--json", env=variables | {"ACCELERATE_MIXED_PRECISION": "no"})
    assert found.returncode == 0 and "quant.gptq" in json.loads(found.stdout)
    assert found.stderr.strip() == ("accelerate launch has started one process; for several: torchrun "
                                    "--nproc-per-node N -m llmopt ...")


@pytest.mark.full
def test_evaluation_requests_are_shared(tmp_path):
    words = ("eval", "llmopt/reference", "--tasks", "world_ppl,world_recall", "--limit", "6", "--anew", "--json")
    line, variables = torchrun()
    alone = subprocess.run([sys.executable, "-m", "llmopt", *words], capture_output=True, text=True, env=variables,
                           timeout=200)
    code, out, err = run("-m", "llmopt", *words)
    assert code == 0, err
    one, two = (json.loads(text)["llmopt/reference"] for text in (alone.stdout, out))
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(value, rel=1e-6) for key, value in one.items())
