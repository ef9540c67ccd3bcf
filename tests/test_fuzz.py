"""Damaged and hostile files: it works, or it is one line and exit code 2; no traceback, no hang, nothing half-written.

Every target is a file that a stranger may have made. It is damaged as a tree (keys deleted, renamed, swapped, numbers
and types that nobody expects) or as bytes (cut, flipped, repeated, made up), then the command is run on it in this
process. Beside each model lies code that nobody may run. `--full`: 300 times as many cases.
"""
import contextlib
import io
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmopt_evals.world.tokenizer import save_tokenizer

from llmopt import recipe
from llmopt.calibration import data
from llmopt.checkpoint import save as checkpoint
from llmopt.cli.commands import main
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_model, load_tokenizer
from llmopt.specs import DataSpec, ModelSpec
from tests import tiny
from tests.damage import (
    damaged_bytes,
    damaged_figures,
    damaged_journal,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_yaml,
    dumped,
)

SECONDS, MEMORY = 20, 2**30                 # for one case; growth of this process over all cases of a target
RECIPE = """# every section
model: {id: m, dtype: float32}
data: {name: world, samples: 4, length: 64, seed: 0}
steps:
  - heads.span: {}
  - prune.magnitude: {ratio: 0.2, scope: global, units: [ffn, kv_groups]}
  - quant.rtn: {bits: 3.5, group_size: 16, allocate: lim, overrides: {model.layers.0.mlp.down_proj: {bits: 8}}}
  - attention.a_shape: {sinks: 4, window: 8, min_length: 0}
  - kv.snapkv: {ratio: 0.5, allocate: prefix}
eval: {tasks: [world_ppl], limit: 4}
format: portable
max_shard_size: 2GB
"""
RTN = "steps:\n  - quant.rtn: {bits: 4, group_size: 16}\n"
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({here!r}, 'ran').touch()\n"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def command(*words: Any) -> Outcome:
    """The command's end in this process; anything but an exit code comes through."""
    out, err = io.StringIO(), io.StringIO()
    kept, sys.argv = sys.argv, ["llmopt", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as leave:
        return Outcome(leave.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = kept
    raise AssertionError("no exit code")


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_size) for p in folder.rglob("*") if "__pycache__" not in p.parts)


def holds(folder: Path, *words: Any) -> None:
    """The property: done, or refused by one line; a refused case leaves `folder` as it was."""
    before = listing(folder)
    end = command(*words)
    assert end.code in (0, 2), end
    if end.code:
        assert end.err.startswith("error: "), end
        assert len(end.err.splitlines()) == 1, end
        assert end.out == "", end
        assert listing(folder) == before, end


class Arena:
    """Whole files to damage, and the place where a case is laid out."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.done = folder, folder / "m", folder / "done"
        model = tiny.make("llama", vocab_size=512, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        for place, size in ((self.model, "1GB"), (folder / "shards", "50KB")):
            model.save_pretrained(place, max_shard_size=size)
            save_tokenizer(place)
            self._plant(place)
        self.write("r.yaml", RECIPE.encode())
        self.write("rtn.yaml", RTN.encode())
        self.write("d.txt", b"the fox runs .\n<|endoftext|>\n" * 20)
        turns = [{"role": "user", "content": "the fox runs ."}, {"role": "assistant", "content": "it hides ."}]
        for name, row in (("text", {"text": "the fox runs ."}), ("chat", {"text": turns}), ("ids", [5, 6, 7, 8])):
            self.write(f"{name}.jsonl", dumped(row) + b"\n" + (dumped(row) + b"\n") * 8)
        self.write("set.txt", b"steps.2.bits=3")
        self.config, self.tokenizer = model.config, load_tokenizer(str(self.model))
        self.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        end = command("compress", "--recipe", folder / "r.yaml", "--model", self.model, "--output", self.done,
                      "--no-eval")
        assert end.code == 0, end
        self._cut_off()

    def _cut_off(self) -> None:
        """What is left of the same run when Ctrl-C comes before anything is saved."""
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", interrupt)
            end = command("compress", "--recipe", self.folder / "r.yaml", "--model", self.model, "--output",
                          self.folder / "cut", "--no-eval")
        assert end.code == 130, end

    def _plant(self, model: Path) -> None:
        """Code beside the weights, and configs that ask for it."""
        for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text(EVIL.format(here=str(self.folder)))
        for name, parts in (("config.json", ("AutoConfig", "AutoModelForCausalLM")),
                            ("tokenizer_config.json", ("AutoTokenizer",))):
            content = json.loads((model / name).read_text())
            content["auto_map"] = dict.fromkeys(parts, "evil.Evil")
            (model / name).write_text(json.dumps(content))

    def write(self, name: str, content: bytes) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    @contextlib.contextmanager
    def replaced(self, name: str, content: bytes):
        """The file with other content, for as long as the block runs."""
        kept = self.read(name)
        self.write(name, content)
        try:
            yield
        finally:
            self.write(name, kept)

    def plan(self, recipe: str, model: str = "m") -> None:
        holds(self.folder, "compress", "--recipe", self.folder / recipe, "--model", self.folder / model, "--dry-run")

    def run(self, recipe: str, model: str = "m") -> None:
        output = self.folder / "out"
        holds(self.folder, "compress", "--recipe", self.folder / recipe, "--model", self.folder / model,
              "--output", output, "--no-eval", "--json")
        shutil.rmtree(output, ignore_errors=True)


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def bounded(arena):
    """A case that takes too long is interrupted; memory, and the code that nobody may run, are looked at afterwards."""
    def late(*_):
        raise TimeoutError(f"a case took more than {SECONDS} s")

    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    assert not list(arena.folder.rglob("ran")), "code of a checkpoint was run"


@dataclass
class Target:
    """A file to damage: how, how many times, and what is run on it."""

    file: str
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    run: Callable[[Arena], None]
    count: int


def show(arena: Arena) -> None:
    holds(arena.folder, "show", arena.done)
    holds(arena.folder, "show", arena.done, "--json")


def resume(arena: Arena) -> None:
    card = "done/README.md"                     # written anew from whatever figures stand in llmopt.json
    with arena.replaced(card, arena.read(card)):
        holds(arena.folder, "compress", "--recipe", arena.folder / "r.yaml", "--model", arena.model, "--output",
              arena.done, "--no-eval", "--resume", "--json")


def go_on(arena: Arena) -> None:
    """Whatever a journal has come to say, the run ends in the bytes that it would have ended in."""
    output = arena.folder / "out"
    shutil.copytree(arena.folder / "cut.llmopt-work", output.with_name("out.llmopt-work"), dirs_exist_ok=True)
    end = command("compress", "--recipe", arena.folder / "r.yaml", "--model", arena.model, "--output", output,
                  "--no-eval", "--resume", "--json")
    assert end.code == 0, end
    done = {file.name: file.read_bytes() for file in arena.done.iterdir() if file.name != "llmopt.log"}
    assert {file.name: file.read_bytes() for file in output.iterdir() if file.name != "llmopt.log"} == done
    shutil.rmtree(output)


def calibrate(file: str, **keys: Any) -> Callable[[Arena], None]:
    def run(arena: Arena) -> None:
        spec = DataSpec(path=str(arena.folder / file), **keys)
        with contextlib.suppress(LlmoptError):
            data.load(spec, arena.config, arena.tokenizer)

    return run


def override(arena: Arena) -> None:
    with contextlib.suppress(LlmoptError):
        recipe.parse(RECIPE, "r.yaml", (arena.read("set.txt").decode(errors="surrogateescape"),))


def load(arena: Arena) -> None:
    with contextlib.suppress(LlmoptError):
        load_model(ModelSpec(id=str(arena.done)))


TARGETS = {
    "recipe": Target("r.yaml", lambda c: damaged_yaml(c.decode()), lambda a: a.plan("r.yaml"), 400),
    "config": Target("m/config.json", damaged_json, lambda a: a.plan("rtn.yaml"), 300),
    "index": Target("shards/model.safetensors.index.json", damaged_json, lambda a: a.plan("rtn.yaml", "shards"), 150),
    "safetensors": Target("m/model.safetensors", damaged_safetensors, lambda a: a.plan("rtn.yaml"), 250),
    "tokenizer": Target("m/tokenizer.json", damaged_json, lambda a: a.plan("rtn.yaml"), 80),
    "tokenizer_config": Target("m/tokenizer_config.json", damaged_json, lambda a: a.plan("rtn.yaml"), 120),
    "generation_config": Target("m/generation_config.json", damaged_json, lambda a: a.plan("rtn.yaml"), 50),
    "show": Target("done/llmopt.json", damaged_json, show, 250),
    "show_config": Target("done/config.json", damaged_json, show, 50),
    "resume": Target("done/llmopt.json", damaged_figures, resume, 100),
    "load": Target("done/config.json", damaged_json, load, 100),
    "journal": Target("cut.llmopt-work/journal", damaged_journal, go_on, 30),
    "text": Target("d.txt", damaged_bytes, calibrate("d.txt", name="text"), 100),
    "jsonl": Target("text.jsonl", damaged_lines, calibrate("text.jsonl", name="text"), 150),
    "chat": Target("chat.jsonl", damaged_lines, calibrate("chat.jsonl", name="text", template="chat"), 150),
    "ids": Target("ids.jsonl", damaged_lines, calibrate("ids.jsonl", name="ids"), 150),
    "set": Target("set.txt", damaged_bytes, override, 150),
    "run_recipe": Target("r.yaml", lambda c: damaged_yaml(c.decode()), lambda a: a.run("r.yaml"), 10),
    "run_config": Target("m/config.json", damaged_json, lambda a: a.run("rtn.yaml"), 20),
    "run_generation": Target("m/generation_config.json", damaged_json, lambda a: a.run("rtn.yaml"), 20),
    "run_tokenizer": Target("m/tokenizer_config.json", damaged_json, lambda a: a.run("rtn.yaml"), 10),
}
QUICK, LONG = 0.06, 20              # times a target's count
TIERS = [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.full)]


def cases(count: int, tier: float):
    return settings(max_examples=max(4, round(count * tier)), derandomize=tier == QUICK, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_one_line(arena, name, tier):
    target = TARGETS[name]

    @cases(target.count, tier)
    @given(target.damage(arena.read(target.file)))
    def check(content: bytes) -> None:
        signal.alarm(SECONDS)
        with arena.replaced(target.file, content):
            target.run(arena)

    check()
