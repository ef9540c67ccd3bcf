"""The limits of control groups, in folders like those of Linux; files that were read in a group count as free."""
from types import SimpleNamespace

import pytest

from llmopt.scale import available as module
from llmopt.scale.available import available

GB = 10**9
NAMES = {2: ("memory.max", "memory.current", ""), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}


def group(folder, limit, version=2, used=3 * GB, cache=(GB, GB)):
    folder.mkdir(parents=True, exist_ok=True)
    most, now, prefix = NAMES[version]
    (folder / most).write_text(f"{limit}\n")
    (folder / now).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(
        f"{prefix}{kind}_file {size}\n" for kind, size in zip(("inactive", "active"), cache, strict=True)))


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with 10 GB left."""
    monkeypatch.setattr(module, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10 * GB)))
    monkeypatch.setattr(module, "ROOT", tmp_path / "groups")
    monkeypatch.setattr(module, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("1:cpu:/\n0::/slurm/job:1/step\n")
    return tmp_path / "groups"


@pytest.mark.parametrize(("own", "place", "version"), [
    ("0::/\n", "", 2), ("0::/slurm/job:1/step\n", "slurm/job:1/step", 2), ("0::/slurm/job:1/step\n", "slurm/job:1", 2),
    ("0::/not/seen/in/here\n", "", 2), ("1:cpu:/\n4:memory:/job\n0::/\n", "memory/job", 1),
    ("4:memory:/not/seen\n", "memory", 1)])
def test_a_group_around_the_process_limits_it(own, place, version, machine, tmp_path):
    (tmp_path / "own").write_text(own)
    group(machine / place, 7 * GB, version)
    assert available() == 6 * GB                       # 7 - 3, and the 2 of files


def test_the_tightest_limit_counts(machine):
    group(machine / "slurm", 9 * GB)
    group(machine / "slurm/job:1", 5 * GB)
    group(machine / "slurm/job:1/step", "max")
    assert available() == 4 * GB
    group(machine / "slurm/job:1/step", 2 * GB)        # a limit that was lowered below what is used
    assert available() == GB
    group(machine / "slurm/job:1/step", GB, cache=(0, 0))
    assert available() == 0


@pytest.mark.parametrize("limit", ["max", 20 * GB, 2**63 - 4096])
def test_without_a_limit_the_machine_counts(limit, machine, tmp_path):
    assert available() == 10 * GB
    group(machine / "slurm", limit)
    assert available() == 10 * GB
    (tmp_path / "own").unlink()
    assert available() == 10 * GB
