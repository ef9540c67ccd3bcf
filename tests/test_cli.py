"""The command as a user runs it: exit codes, one-line errors, nothing left behind, what it prints."""
import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from time import sleep

import pytest

from llmopt.recipe.reader import parse
from tests import warm
from tests.command import call, command, llmopt
from tests.conftest import mount

RECIPE = """# round to nearest
model: {id: llmopt/reference}
steps:
  - quant.rtn: {bits: 4, group_size: 32}
  - kv.snapkv: {ratio: 0.5}
eval: {tasks: [world_copy], limit: 4}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("r") / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    output = tmp_path_factory.mktemp("o") / "out"
    return output, llmopt("compress", "--recipe", recipe, "--output", str(output))


def test_compress_ends_in_a_table(done):
    output, run = done
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[:2] == ["step 1 of 2: quant.rtn", "step 2 of 2: kv.snapkv"]
    for part in ("file size", "bits per quantized weight", "cache bytes per token", "world_copy", "loads with"):
        assert part in run.stdout
    facts = json.loads((output / "llmopt.json").read_text())
    assert facts["predicted_bytes"] == facts["bytes"] == (output / "model.safetensors").stat().st_size
    assert "license: apache-2.0" in (output / "README.md").read_text()
    assert parse((output / "recipe.yaml").read_text(), "").resolved() == facts["recipe"]


@pytest.fixture
def said(monkeypatch, capfd):
    """What the command prints when it ends well."""

    def run(*words) -> str:
        capfd.readouterr()
        code = call(monkeypatch, "-q", *words)
        out, errors = capfd.readouterr()
        assert (code, errors) == (0, "")
        return out

    return run


def test_resume_on_a_finished_output_is_done_at_once(done, recipe, monkeypatch, capfd):
    words = ("compress", "--recipe", recipe, "--output", done[0])
    before = (done[0] / "model.safetensors").stat().st_mtime_ns
    assert call(monkeypatch, *words, "--resume") == 0
    assert (done[0] / "model.safetensors").stat().st_mtime_ns == before
    assert call(monkeypatch, *words) == 2
    assert "--overwrite" in capfd.readouterr().err


def test_show_and_methods_speak_json(done, said):
    assert json.loads(said("show", done[0], "--json"))["format_version"] == 1
    assert "bits" in json.loads(said("methods", "quant.rtn", "--json"))["quant.rtn"]["fields"]
    assert "group_size" in said("methods", "quant.rtn")


def test_show_tells_what_each_step_was_asked_and_did(done, said):
    text = said("show", done[0])
    for part in ("quant.rtn", "group_size 32", "effective_bits 4.5", "kv.snapkv", "ratio 0.5"):
        assert part in text
    assert "minimum" not in text                # its default


def test_on_a_terminal_nothing_but_what_happens_now(tmp_path):
    terminal, end = pty.openpty()
    line, environment = command("eval", "llmopt/reference", "--tasks", "world_copy", "--limit", "2")
    run = subprocess.Popen(line, env=environment | {"TERM": "xterm"}, stderr=end, stdout=subprocess.PIPE, text=True,
                           cwd=tmp_path)                # no git repository, which lm-eval would complain about
    out, _ = run.communicate(timeout=120)
    os.close(end)
    assert run.returncode == 0
    assert "world_copy" in out
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", os.read(terminal, 100_000)).split() == [b"scoring", b"llmopt/reference"]
    os.close(terminal)


def test_heads_take_the_fields_of_their_method_and_how_to_load(said, tmp_path):
    words = ("heads", "llmopt/reference", "--samples", "2", "--json", "--dtype", "float32")
    spans = json.loads(said(*words, "--output", tmp_path / "h.json"))["heads.span"]
    assert [len(layer) for layer in spans] == [8] * 6
    assert json.loads((tmp_path / "h.json").read_text())["scores"] == spans


def test_dry_run_writes_nothing(recipe, tmp_path, said):
    assert "42 weights at 4 bits" in said("compress", "--recipe", recipe, "--dry-run", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


MOMENTS = {
    "starting": lambda folder: True,
    "loading": lambda folder: sleep(5) is None,
    "saving": lambda folder: (folder / "out.llmopt-work" / "output").exists(),
    "scoring": lambda folder: (folder / "out").exists(),
}


@pytest.mark.parametrize("moment", [
    pytest.param(moment, marks=pytest.mark.full if moment in ("starting", "loading", "scoring") else [])
    for moment in MOMENTS])
def test_ctrl_c_leaves_nothing_half_written(recipe, tmp_path, moment):
    line, environment = command("compress", "--recipe", recipe, "--output", tmp_path / "out")
    if moment in ("saving", "scoring"):
        run = warm.start(*line[1:], env=environment)
    else:
        run = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not MOMENTS[moment](tmp_path) and run.poll() is None:
        sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode in (130, 0, -signal.SIGINT), errors      # the last: Python itself was starting or ending
    assert "Traceback" not in errors or run.returncode == -signal.SIGINT
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "out.llmopt-work"}
    if moment in ("saving", "scoring"):
        again = llmopt("compress", "--recipe", recipe, "--output", tmp_path / "out", "--resume")
        assert again.returncode == 0, again.stderr
        assert "world_copy" in again.stdout
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line(recipe, small_disk, monkeypatch, capfd):
    code = call(monkeypatch, "compress", "--recipe", recipe, "--output", small_disk / "out", "--set",
                "steps.0.bits=8", "--set", "format=dense", "--no-eval")
    out, errors = capfd.readouterr()
    assert (code, out) == (2, "")
    assert errors == (f"error: {small_disk}/out: the disk is full; what is finished is kept in "
                      f"{small_disk}/out.llmopt-work, --resume goes on with it\n")
    assert [path.name for path in small_disk.iterdir()] == ["out.llmopt-work"]


def test_a_disk_that_fills_up_while_scoring_keeps_the_checkpoint(recipe, small_disk, monkeypatch, capfd):
    mount(small_disk, "3m", "remount")          # until the end, a run takes the room of its journal too
    words = ("compress", "--recipe", recipe, "--output", small_disk / "out")
    assert call(monkeypatch, *words, "--no-eval") == 0
    before = {p.name: p.read_bytes() for p in (small_disk / "out").iterdir()}
    with pytest.raises(OSError, match="No space"), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    capfd.readouterr()
    assert call(monkeypatch, *words, "--resume") == 2
    errors = capfd.readouterr().err
    *said, error = errors.splitlines()                  # a slow machine speaks of its work before
    assert "No space left on device" in error and not any("rror" in line for line in said)
    assert {p.name: p.read_bytes() for p in (small_disk / "out").iterdir()} == before


def test_a_home_that_cannot_be_written_is_no_obstacle(recipe, tmp_path):
    nowhere = dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), "/proc/nowhere")
    run = llmopt("heads", "llmopt/reference", "--samples", "2", "--plot", tmp_path / "h.png", **nowhere)
    assert run.returncode == 0
    assert [line for line in run.stderr.splitlines() if not line.startswith("heads.span took ")] == []
    assert (tmp_path / "h.png").stat().st_size > 1000


@pytest.mark.full          # tests/evals/test_preflight.py sees the same in a recipe
def test_a_task_whose_data_cannot_be_had_is_one_line():
    run = llmopt("eval", "llmopt/reference", "--tasks", "arc_easy", "--limit", "2")
    assert run.returncode == 2
    assert "arc_easy cannot be run" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
