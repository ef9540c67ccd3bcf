"""Tiny random models of every supported family, made from configs."""
import atexit
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)      # two workers share two cores; results must not depend on the machine's
os.environ["OMP_NUM_THREADS"] = "1"         # of the commands that are run
os.environ["LLMOPT_CACHE"] = tempfile.mkdtemp(prefix="llmopt-tests-")       # no score of the user's is read or written
atexit.register(shutil.rmtree, os.environ["LLMOPT_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the slow tier: clean wheel install, every pair")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="full tier: run with --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


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
