"""What makes two runs the same, so that only such a run goes on with another's work or takes its output for its own."""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmopt.calibration import data
from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.facts import FILE, read_facts
from llmopt.errors import LlmoptError
from llmopt.files import own
from llmopt.files.hub import companion
from llmopt.method import Method
from llmopt.model.loading import load_tokenizer, read_config, resolve
from llmopt.model.ways import view
from llmopt.recipe.reader import Recipe
from llmopt.run.calibrating import needs_data
from llmopt.run.opening import Streaming
from llmopt.scale.journal import checksum, difference
from llmopt.specs import ModelSpec

READ = re.compile(rf"config\.json|generation_config\.json|[^/]+\.safetensors|{own.TOKENIZER}")


def marks(model: ModelSpec, steps: Sequence[Method], batches: list[data.Batch] | None,
          blocks: int | None) -> dict[str, Any]:
    """The model's files, data and versions, which with the recipe make a run; not whether it is streamed.

    blocks: how many the run stops after, None for all.
    """
    read = {name: _mark(Path(name).expanduser()) for step in steps for name in step.reads}
    return {"files": _files(model), "blocks": blocks, "data": data.fingerprint(batches) if batches else None,
            "versions": checkpoint.versions(), **({"steps read": read} if read else {})}


def _files(model: ModelSpec) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file that the output is made from: weights, configs, tokenizer.

    Of the hub's cache config and weights alone: all its files are of one commit, fetched as they are needed.
    """
    source = resolve(model)
    home = companion(source, "config.json", model.revision).parent
    found = [*home.iterdir(), *home.glob("additional_chat_templates/*")] if Path(source).is_dir() else \
        [home / "config.json", *home.glob("*.safetensors")]
    names = {file.relative_to(home).as_posix(): file for file in sorted(found)}
    elsewhere = {file.name: _mark(file) for file in view.files(home)} if view.of(home) else {}
    return {name: _mark(file) for name, file in names.items() if READ.fullmatch(name) and file.is_file()} | elsewhere


def _mark(file: Path) -> list[int] | None:
    """[bytes, CRC-32] of a file; None where there is none, which the step that reads it will say."""
    return [file.stat().st_size, checksum(file)] if file.is_file() else None


def is_finished(output: Path, recipe: Recipe, streaming: Streaming = Streaming(),       # noqa: B008  frozen
                overwrite: bool = False) -> bool:
    """True if `output` is what this very run has written, so that only its evaluation can be missing.

    Raises LlmoptError for one that was made from something else, and is not to be overwritten.
    """
    if not (Path(output) / FILE).is_file():
        return False
    facts = read_facts(Path(output))
    if facts.get("recipe") != recipe.resolved():
        return False
    _, config = read_config(recipe.model)
    tokenizer = load_tokenizer(resolve(recipe.model), recipe.model.revision, recipe.model.trust_remote_code)
    made_from, sampled = facts.get("made_from"), recipe.data.name == "self"
    wanted = needs_data(recipe.steps) and not sampled
    batches = data.load(recipe.data, config, tokenizer) if wanted else None
    expected = marks(recipe.model, recipe.steps, batches, streaming.blocks)
    if sampled:                 # its rows follow from files, recipe and versions, which are compared
        expected["data"] = (made_from or {}).get("data")
    found = difference(made_from, expected)
    if found and not overwrite:
        raise LlmoptError(f"{output}: is finished, and was made from something else: {found}; give --overwrite to "
                          "replace it, or another output")
    return found is None
