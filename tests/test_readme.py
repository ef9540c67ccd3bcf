"""The README's Python runs as it stands, in an empty folder."""
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_a_snippet_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(SNIPPETS[index], f"README snippet {index}", "exec"), names)
    assert torch.isfinite(names["model"](names["ids"]).logits).all()


def test_there_are_snippets():
    assert len(SNIPPETS) == 2
    assert "llmopt.attached" in SNIPPETS[1]
