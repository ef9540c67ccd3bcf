"""The house rules that a machine can check: import direction, file sizes, prints, recipes and README rows."""
import ast
import re
from pathlib import Path

import pytest

import llmopt
from llmopt.model.architectures import SPECS
from llmopt.parts import FAMILIES

ROOT = Path(__file__).parents[1]
# an import points to the left, or stays in its own folder; the evaluation and the command come last
ORDER = ["llmopt_kernels", "errors progress", "parts files", "specs", "model", "scale", "method",
         "runtime recipe", "calibration", " ".join(FAMILIES), "checkpoint", "forecast", "run", "__init__",
         "llmopt_evals", "cli", "__main__"]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
ROOT_FILES = {"__init__.py", "__main__.py", "method.py", "parts.py", "specs.py", "errors.py", "progress.py"}
LAZY_BACK_EDGES = {("calibration", "llmopt_evals"), ("model", "llmopt_evals"),         # the world, llmopt/reference
                   ("model", "runtime"), ("llmopt_evals", "cli"),
                   ("__init__", "llmopt_evals")}        # and parts.FAMILIES, imported by name


def sources() -> list[Path]:
    return [p for top in ("llmopt", "kernels", "evals") for p in sorted((ROOT / top).rglob("*.py"))]


def room(module: str) -> str | None:
    """The room of a dotted module name: a folder or file at the root of llmopt, or a package beside it."""
    first, _, rest = module.partition(".")
    name = (rest.partition(".")[0] or "__init__") if first == "llmopt" else first
    return name if name in LEVELS else "__init__" if first == "llmopt" else None


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"llmopt.{alias.name}" for alias in node.names] if node.module == "llmopt" else [node.module]
    return found


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] in ("kernels", "evals") else parts)


def test_imports_point_one_way():
    wrong = []
    for path in sources():
        mine = room(dotted(path))
        for module in imports(ast.parse(path.read_text())):
            theirs = room(module)
            if theirs is None or theirs == mine or (mine, theirs) in LAZY_BACK_EDGES:
                continue
            if LEVELS[theirs] >= LEVELS[mine]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_the_contract_alone():
    assert {p.name for p in (ROOT / "llmopt").glob("*.py")} == ROOT_FILES


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_only_the_command_prints_and_nothing_swallows_errors():
    wrong = []
    allowed = ("llmopt/cli/commands.py", "llmopt/cli/tables.py", "evals/llmopt_evals/world/train.py",
               "evals/llmopt_evals/world/check.py")
    outermost = ("llmopt/files/checks.py", "llmopt/files/limited.py")     # libraries on foreign files: bare exceptions
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in
                                                        ("Exception", "BaseException")
                    and str(path.relative_to(ROOT)) not in outermost):
                wrong.append(f"{path}:{node.lineno} catches everything")
            if (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
                    and str(path.relative_to(ROOT)) not in allowed):
                wrong.append(f"{path}:{node.lineno} prints")
    assert not wrong, "\n".join(wrong)


def test_only_three_files_know_architectures():
    names = re.compile(r"\b[qkvo]_proj\b|\bmodel\.layers\b|\bgate_proj\b|\bc_attn\b|\bquery_key_value\b")
    wrong = []
    for path in sources():
        if path.name in ("architectures.py", "blocks.py", "modeling.py") or "evals" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Constant)) else ""
            if (isinstance(node, ast.Attribute) and names.search(text)) or text.strip("'") in SPECS:
                wrong.append(f"{path}:{node.lineno} {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", llmopt.names())
def test_every_method_is_in_its_familys_readme_and_in_a_recipe(name):
    readme = (ROOT / "llmopt" / name.split(".")[0] / "README.md").read_text()
    recipes = "\n".join(p.read_text() for p in (ROOT / "recipes").glob("*.yaml"))
    assert f"| `{name}` |" in readme
    assert re.search(rf"- {re.escape(name)}\b", recipes)


def test_the_tree_names_every_top_level_entry():
    readme = (ROOT / "llmopt" / "README.md").read_text()
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("out", "__pycache__", "LICENSE"):
            continue
        assert path.name in readme, path.name


def test_packages_do_not_shadow_those_of_the_index():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "evals" / "__init__.py").exists()
