"""Tiny random models of every supported family, made from configs."""
import atexit
import gc
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import warm  # noqa: E402

torch.set_num_threads(1)      # two workers share two cores; results must not depend on the machine's
os.environ["OMP_NUM_THREADS"] = "1"         # of the commands that are run
os.environ["LLMOPT_CACHE"] = tempfile.mkdtemp(prefix="llmopt-tests-")       # no score of the user's is read or written
atexit.register(shutil.rmtree, os.environ["LLMOPT_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the slow tier: clean wheel install, every pair")


def pytest_collection_modifyitems(config, items):
    """Leave out the full tier, unless it is asked for."""
    if config.getoption("--full"):
        return
    kept, left_out = [], []
    for item in items:
        (left_out if "full" in item.keywords else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, for the full tier: that of LLMOPT_SMOLLM2, else it is made once and kept."""
    from llmopt_evals import real

    from llmopt.errors import LlmoptError

    if given := os.environ.get("LLMOPT_SMOLLM2"):
        return Path(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LLMOPT_CACHE")            # among the user's own caches: the next run finds it there
        try:
            return real.cached("smollm2")
        except LlmoptError as error:
            pytest.skip(f"SmolLM2 cannot be had: {error}")


BUDGET = 40         # CPU-seconds of a file in the default tier, those of processes that it starts included
LAST = pytest.StashKey[float]()             # cpu_seconds() at the end of the last phase of a test


def cpu_seconds() -> float:
    """What this process has taken so far, and all that it has started."""
    return sum(os.times()[:4]) + warm.cpu_seconds()


def pytest_collection_finish(session):
    gc.freeze()             # libraries and tests stay: every gc.collect() of an evaluation would walk through them
    session.config.stash[LAST] = cpu_seconds()


def pytest_unconfigure():
    gc.unfreeze()           # or extensions would report all of them as leaked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let every report carry the CPU time of its phase, from a worker to the terminal."""
    report, now = (yield), cpu_seconds()
    report.user_properties = [*report.user_properties, ("cpu_seconds", now - item.config.stash[LAST])]
    item.config.stash[LAST] = now
    return report


def pytest_terminal_summary(terminalreporter, config):
    """Name the files of the default tier that take more than BUDGET."""
    taken = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            taken[getattr(report, "fspath", None)] += dict(getattr(report, "user_properties", ())).get("cpu_seconds", 0)
    for file, seconds in taken.most_common():
        if seconds > BUDGET and not config.getoption("--full"):
            terminalreporter.write_line(f"{file}: {seconds:.0f} CPU-seconds, the budget of a file is {BUDGET}")


def mount(place, size: str, *options: str) -> None:
    """A real file system of `size` at `place`, or a skip where that is forbidden."""
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "none", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is forbidden here: {mounted.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place, "1m")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)       # weights read from it may still be mapped
