"""The script of CI runs the README's own commands, away from what lies in a contributor's checkout."""
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = """# A page
python3 -m venv .venv && mkdir -p .venv/bin && ln -s "$(type -P true)" .venv/bin/ruff && touch out{}
.venv/bin/ruff && cat kept new && test ! -e old && test ! -e ignored && ls ../shared && : pytest
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    line = ["bash", folder / ".ci/run", *words]
    return subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def checkout(tmp_path):
    """A checkout of another project with this script, in which a contributor is at work."""
    folder = tmp_path / "work"
    (tmp_path / "shared").mkdir()
    for name in (".ci", ".venv"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    for name, text in {"kept": "as committed", "old": "", ".venv/mine": "", "out": "precious", ".gitignore": (
            "ignored\n.venv/\nout\n"), "ignored": "", "README.md": README.format(" # --recipe quickstart")}.items():
        (folder / name).write_text(text)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "old").unlink()
    (folder / "new").write_text("not added yet")
    return folder


def test_it_shows_the_lines_of_our_readme():
    setup, tests = run(ROOT, "--show").stdout.splitlines()
    assert setup.startswith("python3 -m venv .venv && ") and "-e ." in setup and "--recipe quickstart" in setup
    assert tests.startswith(".venv/bin/pip install") and tests.endswith(".venv/bin/pytest")


def test_it_runs_in_a_copy_that_goes_again(checkout):
    before = sorted(checkout.rglob("*"))
    done = run(checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert "as committednot added yet" in done.stdout
    assert sorted(checkout.rglob("*")) == before and (checkout / "out").read_text() == "precious"
    assert sorted(path.name for path in checkout.parent.iterdir()) == ["shared", "work"]


def test_a_command_that_fails_fails_and_leaves_nothing(checkout):
    (checkout / "README.md").write_text(README.format(" && false # --recipe quickstart"))
    assert run(checkout).returncode == 1
    assert sorted(path.name for path in checkout.parent.iterdir()) == ["shared", "work"]


def test_a_readme_without_the_lines_is_told(checkout):
    (checkout / "README.md").write_text(README.format(""))
    done = run(checkout)
    assert done.returncode == 1 and "README.md has no line with: ^python3 -m venv .*--recipe quickstart" in done.stderr
