"""Calibration batches, logits and plain loading for the tests of this folder."""
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tests import warm
from tests.command import ROOT, command
from tests.tiny import ids


def batches(rows: int = 6, length: int = 24) -> list[dict]:
    """Two batches; the first row is right-padded from its middle on."""
    tokens = ids(rows, length)
    mask = torch.ones_like(tokens)
    mask[0, length // 2:] = 0
    return [{"input_ids": tokens[i::2], "attention_mask": mask[i::2]} for i in range(2)]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=ids(2, seed=5), use_cache=False).logits


def loaded_plain(saved: dict[str, nn.Module], place: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(folder, logits in a process that knows transformers alone, those of the model in memory) of each folder."""
    seen = place / "seen.pt"
    done = warm.run(ROOT / "tests" / "load_many.py", "plain", seen, *saved, env=command()[1])
    assert done.returncode == 0, done.stderr
    found = torch.load(seen)["plain"]
    assert [*found] == [*saved]
    for folder, told in found.items():
        assert "error" not in told, (folder, told)
        with torch.no_grad():
            yield folder, told["logits"], saved[folder](ids(2, 40)).logits
