"""`llmopt bench scale` measures real runs: their memory from outside, what their logs say, one process and two."""
import json
import sys

import pytest
from llmopt_evals.bench import scale

from tests.command import call


def test_memory_of_a_process_and_its_children_is_seen_from_outside():
    child = "import time; x = bytearray(80_000_000); time.sleep(1)"
    parent = f"import subprocess, sys; x = bytearray(50_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    peak, code, said = scale.watched([sys.executable, "-c", f"{parent}; sys.exit('done')"])
    assert (code, said) == (1, "done\n")
    assert 130_000_000 < peak.private < 180_000_000


@pytest.mark.parametrize(("words", "says"), [
    (["--shape", "lama-7b"], "there is no shape 'lama-7b' (did you mean 'llama-7b'?)"),
    (["--blocks", "4,none"], "--blocks: '4,none' given"),
    pytest.param(["--recipe", "nothing.yaml", "--blocks", "1"], "nothing", marks=pytest.mark.full)])
def test_bad_words_are_one_line(words, says, monkeypatch, capfd):
    monkeypatch.setattr(scale, "_checkpoint", lambda work, shape, blocks: work)
    assert call(monkeypatch, "bench", "scale", *words) == 2
    out, errors = capfd.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert says in errors


@pytest.mark.full
def test_a_quick_round(monkeypatch, capfd):
    assert call(monkeypatch, "bench", "scale", "--quick", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    one, two = found["memory"]
    assert two["peak_private"] < 1.5 * one["peak_private"]
    assert all(row["seconds_per_block"] > 0 and 0 < row["journal"] < 0.05 for row in found["memory"])
    assert found["processes"]["one"] > 0 and found["processes"]["two"] > 0
    assert len(found["commands"]) == 4
