"""pyproject declares what is imported, and nothing else."""
import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.test_layout import ROOT, imports, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"llmopt", "llmopt_kernels", "llmopt_evals", "tests"}
COMMANDS = {"hatchling", "ruff", "pytest-xdist"}            # of the dev extra: run, not imported


def distribution(name: str) -> str:
    """A requirement, or a distribution's name, in one spelling."""
    return re.match(r"[\w.-]+", name)[0].replace("_", "-").lower()


def imported(paths: list[Path]) -> dict[str, str]:
    """{distribution: a file that imports it}, those of the standard library and our own left out."""
    known, found = packages_distributions(), {}
    for path in paths:
        for module in imports(ast.parse(path.read_text())):
            top = module.split(".")[0]
            if top not in OURS and top not in sys.stdlib_module_names:
                found[distribution(known.get(top, [top])[0])] = str(path.relative_to(ROOT))
    return found


def test_every_import_of_the_packages_is_a_dependency_and_every_dependency_is_imported():
    ours = [path for path in sources() if "peers" not in path.parts]         # those run in environments of their own
    found, declared = imported(ours), {distribution(name) for name in PROJECT["dependencies"]}
    optional = {distribution(name) for extra in ("triton", "gguf")
                for name in PROJECT["optional-dependencies"][extra]}     # imported where they are there
    assert {name: path for name, path in found.items() if name not in declared | optional} == {}
    assert declared - found.keys() == set()


def test_what_the_tests_import_is_in_the_dev_extra():
    tests = imported(list((ROOT / "tests").rglob("*.py")))
    extras = PROJECT["optional-dependencies"]
    dev = {distribution(name) for name in (*extras["dev"], *extras["gguf"])} - {"llmopt"}
    declared = {distribution(name) for name in PROJECT["dependencies"]} | dev
    assert {name: path for name, path in tests.items() if name not in declared} == {}
    assert dev - COMMANDS - tests.keys() == set()


def test_what_the_user_fixed_stays():
    core = {distribution(name) for name in PROJECT["dependencies"]}
    assert {"torch", "transformers", "accelerate", "safetensors", "lm-eval", "datasets", "click"} <= core
    assert [distribution(name) for name in PROJECT["optional-dependencies"]["flash"]] == ["flash-attn"]
