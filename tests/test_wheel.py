"""The wheel in a clean environment, run from another folder: what a stranger without the checkout gets."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmopt

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]
WHERE = """
import json, llmopt, llmopt_evals, llmopt_kernels
from llmopt.model.loading import resolve
from llmopt.recipe import find
print(json.dumps([llmopt.__file__, llmopt_evals.__file__, llmopt_kernels.__file__, str(find("quickstart")),
                  resolve("llmopt/reference")]))
"""


def run(*words, cwd) -> subprocess.CompletedProcess:
    """A command in a folder of its own, where no checkout is on the path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=clean, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    return next(folder.glob("llmopt-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Iterator[Path]:
    """The bin folder of a new environment with torch and the wheel, a gigabyte that goes again afterwards."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", home / "venv", cwd=home)
    run(home / "venv/bin/pip", "install", "-q", "torch==2.13.0", wheel, cwd=home)
    yield home / "venv/bin"
    shutil.rmtree(home)


def test_it_holds_the_packages_the_data_and_the_licence_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tracked = [path.relative_to(ROOT / base) for base in ("kernels", "evals", ".") for path in
               (ROOT / base / {"kernels": "llmopt_kernels", "evals": "llmopt_evals", ".": "llmopt"}[base]).rglob("*")
               if path.is_file() and "__pycache__" not in path.parts]
    expected = {str(p) for p in tracked} | {f"llmopt/recipes/{p.name}" for p in (ROOT / "recipes").iterdir()}
    facts = {name for name in names if ".dist-info/" in name}
    assert set(names) - facts == expected
    assert {f"llmopt_evals/world/{name}/model.safetensors" for name in ("reference", "reference-moe")} <= expected
    assert any(name.endswith("licenses/LICENSE") for name in facts)


def test_everything_comes_from_the_installed_wheel(installed, tmp_path):
    found = json.loads(run(installed / "python", "-c", WHERE, cwd=tmp_path).stdout)
    home = installed.parent / "lib"
    assert all(Path(path).is_relative_to(home) and Path(path).exists() for path in found), found


def test_the_methods_are_listed(installed, tmp_path):
    shown = run(installed / "llmopt", "methods", cwd=tmp_path).stdout
    assert [name for name in llmopt.names() if name not in shown] == []


def test_the_quickstart_is_planned_without_the_checkout(installed, tmp_path):
    shown = run(installed / "llmopt", "compress", "--recipe", "quickstart", "--dry-run", cwd=tmp_path).stdout
    for method in ("heads.span", "prune.magnitude", "quant.gptq", "kv.snapkv", "attention.a_shape"):
        assert method in shown
    assert "predicted" in shown
    assert not any(tmp_path.iterdir())
