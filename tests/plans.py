"""Small recipes on tiny models, and what they wrote: for tests that compare a run in memory with a streamed one."""
from pathlib import Path

from llmopt import recipe
from llmopt.checkpoint import save as checkpoint
from tests import tiny

DATA = "data: {name: ids, path: %s, batch_size: 3}\n"
TIMES = {"llmopt.log"}


def dense(folder: Path, family: str, **changes) -> Path:
    """A sharded dense checkpoint of a tiny model."""
    model = tiny.make(family, **changes)
    return checkpoint.save(model, folder / "dense", max_shard_size="60KB")


def plan(folder: Path, model: Path, steps: str, extra: str = "") -> recipe.Recipe:
    rows = tiny.ids(8, 24).tolist()
    rows[3] = rows[3][:17]                                # padding in the second batch
    (folder / "ids.jsonl").write_text("\n".join(map(str, rows)))
    text = f"model: {{id: {model}}}\n{DATA % (folder / 'ids.jsonl')}max_shard_size: 30KB\n{extra}steps: {steps}\n"
    return recipe.parse(text, "test.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in TIMES}
