"""Every block of code of every README runs, in the order of its page and in one scratch folder for each page."""
import re
import shutil

import pytest

from llmopt import recipe
from tests import readmes, warm
from tests.command import ROOT, call, command, torchrun
from tests.readmes import FULL, LESS, PAGES, READ, among, blocks, check_options, words

LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    """A folder with what the stand-ins name."""
    folder = tmp_path_factory.mktemp("page")
    readmes.furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(patch, "compress", "--recipe", "my.yaml", "--model", "model", "--no-eval", "--output", "made") == 0
    return folder


class Shell:
    """Runs the commands of a page, in this process where that is the same."""

    def __init__(self, monkeypatch, capfd, full: bool, made: dict):
        self.patch, self.capfd, self.full, self.made = monkeypatch, capfd, full, made

    def run(self, line: str) -> None:
        given = words(line)
        if among(READ, line) or among(FULL, line) and not self.full:
            check_options(given)
        elif given[0] == "llmopt":
            self.llmopt(given[1:])
        else:
            self.other(line, given)

    def llmopt(self, given: list[str]) -> None:
        """The command, whose output may go to a file."""
        *given, target = given if ">" in given else (*given, None)
        given = [word for word in given if word != ">"]
        output = given[given.index("--output") + 1] if given[0] == "compress" and "--output" in given else None
        asked = tuple(word for word in given if word != output)
        if output and asked in self.made:
            shutil.copytree(self.made[asked], self.folder / output)
            return
        self.capfd.readouterr()
        code = call(self.patch, *given, *LESS.get(given[0], ()))
        out, errors = self.capfd.readouterr()
        assert code == 0, errors
        if target:
            (self.folder / target).write_text(out)
        if output and "--resume" not in given:
            self.made[asked] = self.folder / output

    def other(self, line: str, given: list[str]) -> None:
        """A module, in a process of its own; several processes under torchrun."""
        assert given[0] in ("python", "torchrun"), f"what is {given[0]}? Say in tests/readmes.py how it is tested"
        launch, variables = torchrun(*given[given.index("-m"):]) if given[0] == "torchrun" else command()
        if given[0] == "torchrun":
            launch += LESS[given[given.index("llmopt") + 1]]
        else:
            given += LESS.get(given[2], ())
        done = warm.run(*(launch[1:] if given[0] == "torchrun" else given[1:]), env=variables, cwd=self.folder)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made():
    """{words of a compression, but the name of its output: the folder that came of it}; it is not run twice."""
    return {}


@pytest.fixture
def shell(furnished, made, tmp_path, monkeypatch, capfd, request):
    """A shell in a fresh copy of the furnished folder."""
    found = Shell(monkeypatch, capfd, request.config.getoption("--full"), made)
    found.folder = shutil.copytree(furnished, tmp_path / "page")
    monkeypatch.chdir(found.folder)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page, shell):
    for block in blocks(page):
        assert block.language in ("", "bash", "python", "yaml"), f"{block}: {block.language} is not run by a test"
        if block.language == "bash":
            for line in block.commands():
                shell.run(line)
        elif block.language == "python":
            exec(compile(block.replaced(), str(block), "exec"), {"__name__": "__main__"})
        elif block.language == "yaml":
            recipe.parse(block.replaced(), str(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_pages_have_blocks():
    assert {"bash", "python"} <= {block.language for block in blocks(ROOT / "README.md")}
    assert sum(len(blocks(page)) for page in PAGES) > 25


def test_an_option_that_does_not_exist_is_found():
    for line in ("llmopt push out USER/REPO --publik", "llmopt bench scale --qick",
                 "python -m llmopt_evals.synthetic --shap x", "torchrun --nproc-per-node 2 -m llmopt eval m --task x"):
        with pytest.raises((readmes.click.NoSuchOption, AssertionError)):
            check_options(words(line))
