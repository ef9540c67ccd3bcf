"""`llmopt doctor`: findings from plain data, and the command on this machine."""
import importlib.metadata as metadata
import json

import pytest
import torch
from packaging.requirements import Requirement

from llmopt.cli import machine
from tests.command import call

MAPS = """7f1 r-xp 0 08:01 1 /venv/torch/lib/libgomp.so.1
7f2 r--p 0 08:01 1 /venv/torch/lib/libgomp.so.1
7f3 r-xp 0 08:01 2 /venv/x/libiomp5.so
7f4 r-xp 0 08:01 3 /usr/lib/libompl.txt
"""


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_requirements_are_held_against_what_is_installed():
    versions = {"a": "1.5", "b": "2.0", "torch": "2.13.0+cpu"}

    def installed(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    wanted = ["a>=1,<2", "b<2", "c>=3", "d>=1; extra == 'gpu'", "torch>=2.13,<2.14", "e; sys_platform == 'nowhere'"]
    found = {f.subject: f for f in machine.held_against(map(Requirement, wanted), installed)}
    assert {name: f.level for name, f in found.items()} == {"a": "ok", "b": "problem", "c": "problem", "torch": "ok"}
    assert found["b"].fact == "2.0, <2 wanted: pip install 'b<2'"
    assert found["c"].fact == "is missing: pip install 'c>=3'"


@pytest.mark.parametrize(("threads", "usable", "load", "expected", "advice"), [
    (1, 2, 9.0, ["ok"], ""), (2, 2, 0.1, ["ok"], ""), (4, 2, 0.1, ["ok", "problem"], "OMP_NUM_THREADS=2 "),
    (4, 0.5, 0.0, ["ok", "problem"], "OMP_NUM_THREADS=1 "), (8, 8, 6.0, ["ok", "note"], "OMP_NUM_THREADS=2 ")])
def test_threads_are_held_against_cores_and_load(threads, usable, load, expected, advice):
    found = list(machine.threads_fit(threads, usable, load))
    assert levels(found) == expected
    assert advice in found[-1].fact


def test_a_container_has_the_cores_of_its_quota(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert machine.usable_cores(quota) == 0.5
    quota.write_text("max 100000\n")
    assert machine.usable_cores(quota) == machine.usable_cores(tmp_path / "none") >= 1


@pytest.mark.parametrize(("cuda", "there", "level", "word"), [
    (None, False, "ok", "cpu alone"), (None, True, "problem", "built for the CPU"),
    ("13.0", True, "problem", "nvidia-smi"), ("13.0", False, "ok", "cpu alone")])
def test_a_gpu_that_torch_does_not_see_is_a_problem(cuda, there, level, word):
    finding, = machine.without_gpu("2.13.0", cuda, there)
    assert finding.level == level
    assert word in finding.fact


def test_several_openmp_runtimes_are_named():
    found = machine.one_runtime(MAPS)
    assert found.level == "note"
    assert "2 runtimes in one process (/venv/torch/lib/libgomp.so.1, /venv/x/libiomp5.so)" in found.fact
    assert machine.one_runtime(MAPS.replace("libiomp5", "libother")).level == "ok"


def test_folders_need_not_be_there_but_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.place("x", tmp_path / "a" / "b", "HERE").level in ("ok", "note")
    found = machine.place("x", tmp_path / "file" / "b", "HERE")
    assert (found.level, "HERE moves it" in found.fact) == ("problem", True)


def test_what_cannot_be_looked_at_is_a_problem_of_its_own():
    def broken():
        yield machine.Finding("ok", "first", "")
        raise OSError("libgomp.so.1: cannot open shared object file")

    assert levels(machine._guarded(broken)) == ["ok", "problem"]


def test_the_command_tells_this_machine_in_lines_and_json(monkeypatch, capfd):
    code = call(monkeypatch, "doctor")
    lines = capfd.readouterr().out.splitlines()
    assert call(monkeypatch, "doctor", "--json") == code
    found = json.loads(capfd.readouterr().out)
    assert [line.split()[0] for line in lines] == [one["level"] for one in found]
    assert {"Python", "CPU", "memory", "torch", "transformers", "hub cache"} <= {one["subject"] for one in found}
    assert code == 2 * any(one["level"] == "problem" for one in found)


def test_a_problem_is_exit_code_2(monkeypatch, capfd):
    before = torch.get_num_threads()
    torch.set_num_threads(500)
    try:
        assert call(monkeypatch, "doctor") == 2
    finally:
        torch.set_num_threads(before)
    assert "\nproblem  threads: 500 threads share" in capfd.readouterr().out
