"""The command as a user runs it: exit codes, one-line errors, nothing left behind, what it prints."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = """# round to nearest
model: {id: llmopt/reference}
steps:
  - quant.rtn: {bits: 4, group_size: 32}
  - kv.snapkv: {ratio: 0.5}
eval: {tasks: [world_copy], limit: 4}
"""


def command(*words: str) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "evals"))
    start = "from llmopt_evals.start import main; main()"       # the body of the installed script
    return [sys.executable, "-c", start, *words], os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def llmopt(*words: str) -> subprocess.CompletedProcess:
    line, environment = command(*words)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


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
    assert run.stderr == ""
    for part in ("file size", "bits per quantized weight", "cache bytes per token", "world_copy", "loads with"):
        assert part in run.stdout
    facts = json.loads((output / "llmopt.json").read_text())
    assert facts["predicted_bytes"] == facts["bytes"] == (output / "model.safetensors").stat().st_size
    assert "license: apache-2.0" in (output / "README.md").read_text()
    assert "--- resolved" in (output / "recipe.yaml").read_text()


def test_resume_on_a_finished_output_is_done_at_once(done, recipe):
    output, _ = done
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert llmopt("compress", "--recipe", recipe, "--output", str(output), "--resume").returncode == 0
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    again = llmopt("compress", "--recipe", recipe, "--output", str(output))
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_show_and_methods_speak_json(done):
    output, _ = done
    assert json.loads(llmopt("show", str(output), "--json").stdout)["format_version"] == 1
    assert "bits" in json.loads(llmopt("methods", "quant.rtn", "--json").stdout)["quant.rtn"]["fields"]
    assert "group_size" in llmopt("methods", "quant.rtn").stdout


def test_dry_run_writes_nothing(recipe, tmp_path):
    run = llmopt("compress", "--recipe", recipe, "--dry-run", "--output", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert "42 weights at 4 bits" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "expected"), [
    (["--set", "steps.0.bit=3"], "'bit'"),
    (["--set", "steps.0.bits=0"], "bits"),
    (["--set", "steps.0.group_size=48"], "group_size 48"),
    (["--set", "eval.tasks=[world_pbl]"], "did you mean 'world_ppl'"),
    (["--model", "./nowhere"], "nowhere"),
])
def test_bad_input_is_one_line_and_exit_code_2(recipe, tmp_path, words, expected):
    run = llmopt("compress", "--recipe", recipe, "--output", str(tmp_path / "out"), *words)
    assert run.returncode == 2
    assert expected in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wait", [4.0, 6.0, 8.0])
def test_ctrl_c_leaves_nothing_half_written(recipe, tmp_path, wait):
    line, environment = command("compress", "--recipe", recipe, "--output", str(tmp_path / "out"))
    run = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    time.sleep(wait)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode in (130, 0, -signal.SIGINT), errors      # the last: Python itself was starting or ending
    left = [p.name for p in tmp_path.iterdir()]
    assert left in ([], ["out"])
    if left:
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert (tmp_path / "out" / "llmopt.json").is_file()


def test_a_task_whose_data_cannot_be_had_is_one_line():
    run = llmopt("eval", "llmopt/reference", "--tasks", "arc_easy", "--limit", "2")
    assert run.returncode == 2
    assert "arc_easy cannot be run" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
