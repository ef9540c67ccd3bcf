"""What a script of this folder is asked to do, and what it says of it; in any environment that has torch.

    PYTHON with_NAME.py JOB.json        reads the job, writes the checkpoint, puts its answer in the job's place
"""
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass
class Job:
    """Compress `model`, a folder, into the folder `out` by what it computes from the rows of `ids`."""

    model: str
    ids: str                    # a .jsonl of token ids, a row a line, all of one length
    bits: int | float = 0       # quantization; a fraction: llmopt's own
    group_size: int = -1        # -1: one scale for each output channel
    ratio: float = 0.0          # pruning: the share of the FFN channels that leaves
    out: str = ""
    iterations: int = 200       # of methods that have some
    seed: int = 0               # of torch, and of llmopt's methods; AutoRound has one of its own
    steps: list[dict] = field(default_factory=list)         # llmopt's own: what a recipe's `steps` say
    solver: float = 0.0         # the answer: CPU seconds of calibration and solving
    versions: dict[str, str] = field(default_factory=dict)          # the answer, too
    plain: str | None = None    # the answer: the same weights in a folder that anything loads, if `out` is none

    def rows(self) -> list[list[int]]:
        """The token ids."""
        return [json.loads(line) for line in Path(self.ids).read_text().splitlines()]

    def loader(self, batch_size: int) -> torch.utils.data.DataLoader:
        """The rows as batches {"input_ids", "attention_mask"}, in order."""
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.tensor(self.rows())]
        return torch.utils.data.DataLoader(rows, batch_size=batch_size)

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Counts the CPU seconds of all threads inside."""
        before = time.process_time()
        yield
        self.solver += time.process_time() - before


def carry_out(work: Callable[[Job], None], *packages: str) -> None:
    """Do the job that the command line names; packages: whose versions belong to the answer."""
    file = Path(sys.argv[1])
    job = Job(**json.loads(file.read_text()))
    torch.manual_seed(job.seed)
    work(job)
    job.versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    file.write_text(json.dumps(asdict(job)))
