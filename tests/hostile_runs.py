"""Commands on hostile folders, each in a fork with limits of time and memory: how it ended, what it took and said."""
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from llmopt_evals.world.tokenizer import save_tokenizer

from llmopt.cli.commands import main
from tests import tiny
from tests.hostile import DENSE, MADE, TEMPLATE, template

SECONDS, MEMORY = 10, 2**30                # of a case: CPU time, memory above what the parent has
RECIPE = """data: {{name: text, path: {0}/d.jsonl, template: {1}, samples: 16}}
steps:
  - quant.gptq: {{bits: 4, group_size: 16, sweeps: 0}}
"""
MADE_RECIPE = """data: {{name: text, path: {0}/d.jsonl, samples: 16}}
steps:
  - heads.span: {{}}
  - prune.magnitude: {{ratio: 0.2, scope: global}}
  - quant.rtn: {{bits: 3.5, group_size: 16, allocate: lim}}
  - kv.snapkv: {{ratio: 0.5, allocate: heads, heads: heads.span}}
"""


@dataclass
class Ended:
    """How a command ended: its exit code (None: it did not come back by itself), words, and what it took."""

    code: Any
    said: str
    seconds: float = 0.0
    megabytes: int = 0

    @property
    def fault(self) -> str | None:
        """What is wrong with that, if anything: it works, or it is one line and exit code 2."""
        lines = self.said.strip().splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        loud = [line for line in lines if "Traceback" in line or "panicked" in line]
        refused = self.code == 2 and len(told) == 1 and not loud
        if not (self.code == 0 or refused):
            return f"{self.code}: {self.said[-400:]}"
        over = self.seconds > SECONDS or self.megabytes << 20 > MEMORY
        return f"{self.seconds:.1f} s, {self.megabytes} MB: {self.said[-200:]}" if over else None


def called(words: list[Any]) -> Ended:
    """The command in this process; anything but an exit code is a traceback."""
    out, err, kept = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["llmopt", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as leave:
        return Ended(leave.code, err.getvalue())
    except BaseException:       # noqa: BLE001  whatever it is, it is told
        return Ended("traceback", traceback.format_exc())
    finally:
        sys.argv = kept
    return Ended("no exit code", "")


def plain(folder: Path) -> Ended:
    """transformers alone, after `import llmopt`: an exception with one line is a refusal."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(tiny.ids(1, 8), use_cache=True)
        return Ended(0, "")
    except Exception as error:      # noqa: BLE001
        return Ended(2, "error: " + " ".join(str(error).split()))


def commands(home: Path, folder: Path) -> dict[str, Callable[[], Ended]]:
    """What is done with a folder, by name."""
    out = home / f"out-{os.getpid()}"
    lines = {
        "chat": ["compress", "--recipe", home / "chat.yaml", "--model", folder, "--output", out, "--no-eval"],
        "compress": ["compress", "--recipe", home / "text.yaml", "--model", folder, "--output", out, "--no-eval"],
        "show": ["show", folder],
        "eval": ["eval", folder, "--tasks", "world_ppl", "--limit", "2"],
        "heads": ["heads", folder, "--data", home / "d.jsonl", "--samples", "16"],
    }
    return {name: lambda words=words: called(words) for name, words in lines.items()} | {
        "from_pretrained": lambda: plain(folder)}


def in_child(act: Callable[[], Ended]) -> Ended:
    """`act` in a fork with limits of time and memory; its own words on file descriptors 1 and 2 count as said."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as words:
        child = os.fork()
        if child == 0:
            _act(act, answer, words)
        _, status, used = os.wait4(child, 0)
        answer.seek(0)
        words.seek(0)
        said = words.read().decode(errors="replace")
        ended = pickle.load(answer) if os.fstat(answer.fileno()).st_size else Ended(
            None, f"status {os.waitstatus_to_exitcode(status)}")
        ended.said += said
        ended.seconds = used.ru_utime + used.ru_stime
        return ended


def _act(act: Callable[[], Ended], answer: Any, words: Any) -> None:
    limit = psutil.Process().memory_info().vms + 3 * MEMORY         # address space; what counts is what is touched
    for descriptor in (1, 2):
        os.dup2(words.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 3, SECONDS + 3))
    signal.alarm(20 * SECONDS)
    before = psutil.Process().memory_info().rss
    try:
        ended = act()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ended.megabytes = max(0, peak - before) >> 20
        pickle.dump(ended, answer)
        answer.flush()
    finally:
        os._exit(0)


def make(home: Path) -> None:
    """The valid folders `m` and `done`, calibration data and recipes."""
    model = tiny.make("llama", vocab_size=512, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    model.save_pretrained(home / "m")
    save_tokenizer(home / "m")
    template(TEMPLATE)(home / "m")
    row = json.dumps({"text": "the fox runs near the river . " * 4}) + "\n"
    (home / "d.jsonl").write_text(row * 16)
    for name, chat in (("chat", "chat"), ("text", "null")):
        (home / f"{name}.yaml").write_text(RECIPE.format(home, chat))
    (home / "made.yaml").write_text(MADE_RECIPE.format(home))
    ended = called(["compress", "--recipe", home / "made.yaml", "--model", home / "m", "--output", home / "done",
                    "--no-eval"])
    assert ended.code == 0, ended


def run(home: Path, name: str, which: list[str]) -> dict[str, Ended]:
    """What came of each command on one hostile folder."""
    source, edit = (home / "m", DENSE[name]) if name in DENSE else (home / "done", MADE[name])
    folder = home / name
    shutil.copytree(source, folder)
    edit(folder)
    acts = commands(home, folder)
    found = {what: in_child(acts[what]) for what in which}
    shutil.rmtree(folder)
    for left in home.glob("out-*"):
        shutil.rmtree(left)
    return found
