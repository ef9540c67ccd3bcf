"""The house rules that a machine can check: import direction, file sizes, prints, recipes and README rows."""
import ast
import re
from pathlib import Path

import pytest

import llmopt
from llmopt.architectures import SPECS

ROOT = Path(__file__).parents[1]
FAMILIES = ("heads", "kv", "quant", "prune", "attention")
LEVELS = {
    "llmopt_kernels": 0, "llmopt.ranks": 0, "llmopt.gauge": 0, "llmopt.room": 0, "llmopt.available": 0,
    "llmopt.method": 1, "llmopt.modeling": 1, "llmopt.architectures": 1, "llmopt.yaml_lines": 2, "llmopt.recipe": 3,
    "llmopt.blocks": 2, "llmopt.walk": 3, "llmopt.activations": 3, "llmopt.data": 4,
    "llmopt.shards": 2, "llmopt.folder": 2, "llmopt.hub": 3, "llmopt.facts": 3, "llmopt.card": 4, "llmopt.loading": 4,
    "llmopt.store": 5, "llmopt.journal": 4, "llmopt.kept": 7,
    "llmopt.layer": 1, "llmopt.calls": 1, "llmopt.cache": 2, "llmopt.moments": 1, "llmopt.finite": 2,
    "llmopt.geometry": 3, "llmopt.interface": 2, "llmopt.live": 4, "llmopt.runtime": 5,
    **{f"llmopt.{family}": 6 for family in FAMILIES},
    "llmopt.verify": 2, "llmopt.rehearsal": 6, "llmopt.checkpoint": 7, "llmopt.stream": 8,
    "llmopt.forecast": 7, "llmopt.predict": 8,
    "llmopt.streaming": 9, "llmopt.pipeline": 10, "llmopt.dryrun": 11, "llmopt": 11, "llmopt.terminal": 2,
    "llmopt_evals": 12, "llmopt.cli": 13, "llmopt.__main__": 14,
}
LAZY_BACK_EDGES = {("llmopt.data", "llmopt_evals"), ("llmopt.loading", "llmopt_evals"),   # world, llmopt/reference
                   ("llmopt.modeling", "llmopt"),                                # attach where llmopt is installed
                   ("llmopt.loading", "llmopt.blocks"), ("llmopt_evals", "llmopt.cli")}


def sources() -> list[Path]:
    return [p for top in ("llmopt", "kernels", "evals") for p in sorted((ROOT / top).rglob("*.py"))]


def place(path: Path) -> str:
    """The layer a file belongs to: a family, a package, or a module of llmopt."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "evals"):
        return parts[1]
    if len(parts) > 2:
        return f"llmopt.{parts[1]}"
    return "llmopt" if parts[1] == "__init__" else f"llmopt.{parts[1]}"


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "llmopt":
                whole = [f"llmopt.{alias.name}" for alias in node.names]
                found += [name if name in LEVELS else "llmopt" for name in whole]
            else:
                found.append(node.module)
    return found


def layer(module: str) -> str | None:
    for name in sorted(LEVELS, key=len, reverse=True):
        if module == name or module.startswith(name + "."):
            return name
    return None


def test_imports_point_one_way():
    wrong = []
    for path in sources():
        mine = place(path)
        for module in imports(ast.parse(path.read_text())):
            theirs = layer(module)
            if theirs is None or theirs == mine or (mine, theirs) in LAZY_BACK_EDGES:
                continue
            if LEVELS[theirs] >= LEVELS[mine]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_only_the_command_prints_and_nothing_swallows_errors():
    wrong = []
    allowed = ("llmopt/cli.py", "llmopt/terminal.py", "evals/llmopt_evals/world/train.py",
               "evals/llmopt_evals/world/check.py")
    outermost = ("llmopt/folder.py",)           # where libraries read foreign files: they raise bare exceptions
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
def test_every_method_is_in_the_readme_and_in_a_recipe(name):
    readme = (ROOT / "README.md").read_text()
    recipes = "\n".join(p.read_text() for p in (ROOT / "recipes").glob("*.yaml"))
    assert f"`{name}`" in readme
    assert re.search(rf"- {re.escape(name)}\b", recipes)


def test_the_readme_tree_names_every_top_level_entry():
    readme = (ROOT / "README.md").read_text()
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("out", "__pycache__", "LICENSE"):
            continue
        assert path.name in readme, path.name


def test_packages_do_not_shadow_those_of_the_index():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "evals" / "__init__.py").exists()
