"""The blocks of code in the READMEs, and what stands in for the names that a reader replaces with their own."""
import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from llmopt_evals.world.text import perplexity_text

from llmopt.cli.commands import cli
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(page for folder in ("llmopt", "recipes", "evals", "kernels", "tests")
                                      for page in (ROOT / folder).rglob("README.md"))])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)

# A tiny model with random weights, a text, a recipe and a checkpoint stand in for those of the reader.
STAND_INS = {"MODEL": "model", "FOLDER": "made", "FILE": "text.txt", "smollm2": "model", "FOLDER_OR_HUB_NAME": "model",
             "arc_easy,gsm8k": "text_ppl --text text.txt"}
FILES = {"my.yaml": "steps: [quant.rtn: {bits: 4, group_size: 32}]\n",
         "calibration.txt": "a text of thirty two tokens or more, to calibrate on " * 8}
# Less data than the page has, so that a command takes a second.
LESS = {"compress": ("--set", "data.samples=2", "--set", "data.length=32", "--set", "eval.limit=1"),
        "eval": ("--limit", "1"), "heads": ("--samples", "2", "--length", "32"),
        "llmopt_evals.needles": ("--documents", "1", "--needles", "1")}
# Commands that no test runs as they stand, and why. Their options are held against the command's own.
READ = {"-m venv": "run by .ci/run", "pip": "run by .ci/run", "pytest": "these tests", "ruff": "run by .ci/run",
        "--recipe quickstart": "run by .ci/run", "push": "a hub account", "pull": "the hub", "m7": "13 GB",
        "world.train": "an hour and more", "synthetic": "gigabytes", "bench scale": "minutes",
        "bench quant": "run by tests/evals/test_quantizers.py", "bench prune": "run by tests/evals/test_pruners.py",
        "bench attention": "run by tests/evals/test_sparse_speed.py",
        "llmopt_evals.real": "90 MB of the index", "num_fewshot": "data of the hub",
        "continuations": "run by tests/evals/test_continuations.py",
        "recall llmopt/reference": "run by tests/evals/test_recall.py",
        "llmopt_evals.pieces": "run by tests/evals/test_continuations.py",
        "llmopt_evals.padding": "run by tests/evals/test_continuations.py",
        "kvpress/bin/python": "an environment of kvpress's own",
        ".llmopt-complete": "a shell's start file", "completions": "a shell's start file",
        "--recipe magnitude": "a model of ten blocks", "--recipe everything": "run by test_end_to_end.py"}
FULL = {"torchrun": "two cold processes", "world.check": "half a minute",
        "--ablate": "many evaluations; a smaller one is run by tests/test_examples.py"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def replaced(self) -> str:
        """The text with the stand-ins in the places of names."""
        text = self.text
        for name, stand_in in STAND_INS.items():
            text = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w/])", lambda _, put=stand_in: put, text)
        return text

    def commands(self) -> list[str]:
        """The commands of a block of bash, one a line."""
        text = self.replaced().replace("\\\n", " ")
        return [part for line in text.splitlines() for part in line.split(" && ") if shlex.split(part, comments=True)]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text[:found.start()].count("\n") + 1, *found.groups()) for found in FENCE.finditer(text)]


def words(line: str) -> list[str]:
    """The words of a command line, without variables in front and the path of a virtual environment."""
    parts = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", parts[0]):
        parts.pop(0)
    return [parts[0].removeprefix(".venv/bin/"), *parts[1:]]


def among(table: dict[str, str], line: str) -> bool:
    """True if a command is one of those in the table."""
    return any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", line) for key in table)


def check_options(given: list[str]) -> None:
    """Raise for an option that the command does not have; nothing is run."""
    if "-m" in given and given[0] in ("python", "torchrun"):
        given = given[given.index("-m") + 1:]
    if given[0] == "llmopt" and given[1] != ">":
        command, rest = cli, given[1:]
        while isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_parser(click.Context(command)).parse_args(list(rest))
    elif given[0].startswith("llmopt_evals"):
        module = "lm_eval._cli.run" if given[0] == "llmopt_evals" else given[0]
        source = Path(find_spec(module).origin).read_text(encoding="utf-8")
        missing = [word for word in given if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{given[0]} has no {missing}"


def furnish(folder: Path) -> None:
    """Write what the stand-ins name, but the checkpoint."""
    text = perplexity_text(40, 60)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(text))
    tokenizer = tiny.tokenizer(text)
    model = tiny.make("llama", vocab_size=len(tokenizer), intermediate_size=128, max_position_embeddings=1024,
                      num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, content in FILES.items():
        (folder / name).write_text(content)
