"""Saving and loading compressed checkpoints.

A checkpoint is written into a hidden sibling folder, synced, loaded afresh and compared with the model in memory,
and only then renamed to its name: whatever stands under that name is whole.
"""
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt import runtime
from llmopt.checkpoint.card import write_card
from llmopt.checkpoint.compressed_tensors import export, quantization_config
from llmopt.checkpoint.facts import FILE, FORMAT_VERSION, read_facts
from llmopt.checkpoint.older import keep_tokenizer_class, with_rotary_names
from llmopt.checkpoint.verify import verify
from llmopt.errors import LlmoptError, naming
from llmopt.files import own, shards
from llmopt.files.checks import read_json
from llmopt.files.hub import companion
from llmopt.model.loaded import evaluating, with_codes
from llmopt.model.loading import load_model
from llmopt.model.modeling import remote_files, saved_config
from llmopt.model.state import packs, plain_state
from llmopt.model.stored import packed_in_place
from llmopt.model.usable import check_model
from llmopt.model.weights import check_consistent
from llmopt.specs import ModelSpec

VERSIONS = ("llmopt", "torch", "transformers", "compressed-tensors", "safetensors")


def versions() -> dict[str, str]:
    """The packages on which the bytes of a checkpoint depend."""
    return {name: version(name) for name in VERSIONS}


def prepare_output(output: Path, source: str | None, overwrite: bool) -> Path:
    """`output`, absolute. Raises LlmoptError unless it is a folder that does not exist, is empty, or may be replaced.

    Only a checkpoint of llmopt, with nothing in it that llmopt did not write, is replaced, and only with `overwrite`.
    """
    try:
        output = Path(output).expanduser().resolve()
    except RuntimeError as error:               # links in a circle, ~ of an unknown user
        raise LlmoptError(f"{output}: {error}") from error
    _check_place(output)
    own.check_is_folder(output)
    if source and Path(source).is_dir() and output.is_relative_to(Path(source).resolve()):
        raise LlmoptError(f"{output}: lies inside the model's folder {source}; choose another output")
    if output.is_dir() and any(output.iterdir()):
        _check_replaceable(output, overwrite)
    return output


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Raise LlmoptError unless all that a folder holds was written by llmopt, and is to be given up."""
    if not (output / FILE).exists():
        raise LlmoptError(f"{output}: is not empty and not a checkpoint made by llmopt (no {FILE}); it is not replaced")
    if not overwrite:
        raise LlmoptError(f"{output}: is not empty; give --overwrite to replace it, or another output")
    with naming(f"{output}: is not replaced"):
        facts = read_facts(output)
    if strange := own.foreign(output, own.CHECKPOINT):
        raise LlmoptError(f"{output}: holds {', '.join(strange[:9])}, which llmopt did not write; move it "
                          "elsewhere, or choose another output")
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if size not in (0, facts["bytes"]):
        raise LlmoptError(f"{output}: its weights are not those that llmopt wrote ({size:,} bytes, {FILE} says "
                          f"{facts['bytes']:,}); it is not replaced")


def _check_place(output: Path) -> None:
    """Raise LlmoptError for a place where no folder can be made, before any work is done."""
    above = next(folder for folder in output.parents if folder.exists())
    if not above.is_dir():
        raise LlmoptError(f"{output}: {above} is a file or device; an output is a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise LlmoptError(f"{output}: {above} may not be written to")


@contextmanager
def staged(output: Path, work: Path | None = None) -> Iterator[Path]:
    """A folder in `work`, or a hidden sibling, that becomes `output` when all ends well, and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = work / "output" if work else output.with_name(f".{output.name}.llmopt-partial-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    with vanishing(stage, output):
        stage.mkdir()
        yield stage
        shards.sync(stage)
        _replace(stage, output)


@contextmanager
def vanishing(folder: Path, output: Path) -> Iterator[None]:
    """Whatever happens, `folder` is gone afterwards; a full disk, or a limit on files, is one line about `output`."""
    try:
        yield
    except OSError as error:
        if error.errno in shards.FULL:
            raise shards.DiskFull(f"{output}: {shards.FULL[error.errno]}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(stage: Path, output: Path) -> None:
    """Put `stage` in the place of `output`; the old folder goes only after the new one stands."""
    old = output.with_name(f".{output.name}.llmopt-old-{os.getpid()}")
    if output.exists():
        output.rename(old)
    stage.rename(output)
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.llmopt-old-*"):    # of killed runs too
        if leftover == old or (leftover / FILE).is_file():
            with suppress(OSError):
                own.remove(leftover, own.CHECKPOINT)


class Weights:
    """The weights that `save` writes and checks: a model in memory. A streamed run has its own."""

    def __init__(self, model: nn.Module, format: str):
        self.model, self.format = model, format

    def write(self, stage: Path, max_shard_size: str) -> None:
        tensors = state(self.model, self.format)
        with shards.full_disks():
            shards.write(stage, tensors, max_shard_size)

    def verify(self, stage: Path) -> None:
        verify(stage, self.model)


def save(model: nn.Module, output: str | Path, tokenizer: Any = None, *, report: Any = None, source: str | None = None,
         recipe: Any = None, format: str = "portable", max_shard_size: str = "2GB", overwrite: bool = False,
         finish: Callable[[Path], None] | None = None, weights: Weights | None = None,
         work: Path | None = None) -> Path:
    """Write `model` (weights, runtime parts, provenance) to the folder `output` and check it by a fresh load.

    format: "portable" (compressed-tensors, symmetric) or "dense" (rounded weights written dense).
    finish: called with the folder before it gets its name, for what must be inside (a log, evaluation figures).
    weights: where they are, if not in the model. work: an existing folder beside `output` to write it in.
    Raises LlmoptError for an output in use or content that the format cannot hold, VerificationError if the fresh
    load differs.
    """
    check_model(model, streamed=weights is not None)
    output = prepare_output(Path(output), source, overwrite)
    with with_codes(model), staged(output, work) as stage:
        fill(stage, model, tokenizer, report=report, source=source, recipe=recipe, max_shard_size=max_shard_size,
             weights=weights or Weights(model, format))
        if finish:
            finish(stage)
        write_card(stage)
    return output


def fill(stage: Path, model: nn.Module, tokenizer: Any, *, weights: "Weights", max_shard_size: str,
         report: Any = None, source: str | None = None, recipe: Any = None) -> None:
    """Write everything but the card into `stage`, and check it by a fresh load."""
    if model.get_output_embeddings() is None:
        raise LlmoptError(f"a {type(model).__name__} has no language-model head, and a checkpoint is that of a causal "
                          "LM; load the model with AutoModelForCausalLM")
    config, remote = described(model, weights.format)
    weights.write(stage, max_shard_size)
    _write_json(stage / "config.json", config)
    for name, text in remote.items():
        (stage / name).write_text(text)
    _copy_companions(stage, model, tokenizer, source, recipe.model.revision if recipe else None)
    _write_provenance(stage, model, report, source, recipe, weights.format)
    with evaluating(model):
        weights.verify(stage)


def contents(model: nn.Module, format: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """(tensors, config.json, code files) of the checkpoint that `model` would make; works on the meta device too."""
    return state(model, format), *described(model, format)


def state(model: nn.Module, format: str) -> dict[str, Tensor]:
    """The tensors of the checkpoint that `model` would make."""
    packing = packs(model, format)
    tensors = plain_state(model, renamed=not packing)
    if format == "dense":
        check_consistent(model)
    return packed_in_place(tensors, export(model)[0]) if packing else tensors


def described(model: nn.Module, format: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(config.json, code files) of the checkpoint that `model` would make; its weights may be on the meta device."""
    config, needs_code = saved_config(model)
    config = with_rotary_names(config)
    for key in ("llmopt", "quantization_config"):       # of the time when it was loaded
        config.pop(key, None)
    if packs(model, format):
        config["quantization_config"] = quantization_config(model)
    attached = runtime.runtime_config(model)
    if attached and attached["steps"]:
        config["llmopt"] = attached
    remote = {}
    if needs_code or "llmopt" in config:
        remote, config["auto_map"] = remote_files(model)
    return config, remote


def _copy_companions(stage: Path, model: nn.Module, tokenizer: Any, source: str | None, revision: str | None) -> None:
    """Tokenizer with its chat template, generation config, and the base model's licence."""
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
        keep_tokenizer_class(stage, companion(source, "tokenizer_config.json", revision) if source else None)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(stage)
    _leave_code_behind(stage, tokenizer)
    for name in own.LICENCES if source else ():
        file = companion(source, name, revision)
        if file:
            shutil.copyfile(file, stage / name)


def _leave_code_behind(stage: Path, tokenizer: Any) -> None:
    """Strike out the code that a source's configs name, but for that of a tokenizer which its user has let run."""
    allowed = type(tokenizer).__module__.startswith("transformers_modules")
    names = ("generation_config.json", *(() if allowed else ("tokenizer_config.json",)))
    for file in (stage / name for name in names if (stage / name).is_file()):
        content = read_json(file)
        if content.pop("auto_map", None) is not None:
            _write_json(file, content)


def _write_provenance(stage: Path, model: nn.Module, report: Any, source: str | None, recipe: Any, format: str) -> None:
    import yaml

    if recipe is not None:
        body = recipe.text.rstrip("\n") + "\n\n# --- resolved: every default written out, what `llmopt` ran ---\n"
        resolved = yaml.safe_dump(recipe.resolved(), sort_keys=False)
        (stage / "recipe.yaml").write_text(body + "".join(f"# {line}\n" for line in resolved.splitlines()))
    _write_json(stage / FILE, {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "base_model": recipe.model.id if recipe is not None else model.config._name_or_path,
        "base_repo": _repo(source),
        "base_licence": _licence(source, recipe.model.revision if recipe is not None else None),
        "recipe": recipe.resolved() if recipe is not None else None,
        "changes": list(recipe.changes) if recipe is not None else [],
        "format": format,
        "loads_with": how_to_load(json.loads((stage / "config.json").read_text())),
        "bytes": shards.written_bytes(stage),
        **(report.to_dict() if report is not None else {}),
    })


def _repo(source: str | None) -> str | None:
    """The name of a model of the hub, which a card may link to; None for a folder, whose path is nobody's business."""
    return None if source is None or Path(source).exists() else source


def _licence(source: str | None, revision: str | None) -> str | None:
    """The `license:` entry of the base model's card."""
    card = companion(source, "README.md", revision) if source else None
    if card is None:
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    lines = head[1].splitlines() if len(head) > 2 else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")), None)


def how_to_load(config: dict[str, Any]) -> dict[str, str]:
    """For each way of loading, what it gives: "exact", "dense behaviour" or "refused"."""
    per_layer, live = "per_layer_config" in config, "llmopt" in config
    plain = "refused: per-layer shapes" if per_layer else ("same weights, dense behaviour" if live else "exact")
    trusted = "exact (runtime parts need llmopt installed)" if live else "exact"
    return {"transformers": plain, "trust_remote_code": trusted, "import llmopt": "exact"}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, default=_jsonable) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"{type(value).__name__} does not belong into a JSON file")


def load(folder: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu") -> tuple[nn.Module, Any]:
    """(model, tokenizer or None) of a checkpoint, its runtime parts attached; LlmoptError for damaged files."""
    name = str(dtype).removeprefix("torch.")
    return load_model(ModelSpec(id=str(folder), dtype=None if name == "auto" else name, device=device))
