"""Saving and loading compressed checkpoints.

A checkpoint is written into a hidden sibling folder, synced, loaded afresh and compared with the model in memory,
and only then renamed to its name: whatever stands under that name is whole.
"""
import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt import runtime
from llmopt.checkpoint.card import write_card
from llmopt.checkpoint.compressed_tensors import OURS, export, ours, quantization_config
from llmopt.checkpoint.facts import FILE, FORMAT_VERSION
from llmopt.checkpoint.older import keep_tokenizer_class, with_rotary_names
from llmopt.checkpoint.origin import origin
from llmopt.checkpoint.place import prepare_output, staged
from llmopt.checkpoint.verify import verify
from llmopt.errors import LlmoptError, naming_arguments
from llmopt.files import own, shards
from llmopt.files.checks import read_json
from llmopt.files.hub import companion
from llmopt.files.plans import FILE as PLAN
from llmopt.model import expert_files
from llmopt.model.loaded import evaluating, with_codes
from llmopt.model.loading import load_model
from llmopt.model.modeling import remote_files, saved_config
from llmopt.model.state import packs, plain_state
from llmopt.model.stay_packed import check_packed, packing
from llmopt.model.stored import packed_in_place, refuse_rounded_inputs
from llmopt.model.usable import check_model
from llmopt.model.ways import view
from llmopt.model.weights import check_consistent
from llmopt.prune.plan_file import layers_of
from llmopt.quant.plan_file import plans_of
from llmopt.specs import ModelSpec

VERSIONS = ("llmopt", "torch", "transformers", "compressed-tensors", "safetensors")


@cache
def versions() -> dict[str, str]:
    """The packages on which the bytes of a checkpoint depend."""
    return {name: version(name) for name in VERSIONS}


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


@naming_arguments
def save(model: nn.Module, output: str | Path, tokenizer: Any = None, *, report: Any = None, source: str | None = None,
         recipe: Any = None, format: str = "portable", max_shard_size: str = shards.LARGEST, overwrite: bool = False,
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
        refuse_rounded_inputs(model)
    return expert_files.filed(model, packed_in_place(tensors, export(model)[0])) if packing else tensors


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
    """Tokenizer with its chat template, what prepares images and sound, generation config, the base model's licence."""
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
        keep_tokenizer_class(stage, companion(source, "tokenizer_config.json", revision) if source else None)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(stage)
    for name in (*own.PROCESSORS, *own.LICENCES) if source else ():
        file = companion(source, name, revision)
        if file:
            shutil.copyfile(file, stage / name)
    _leave_code_behind(stage, tokenizer)


def _leave_code_behind(stage: Path, tokenizer: Any) -> None:
    """Strike out the code that a source's configs name, but for that of a tokenizer which its user has let run."""
    allowed = type(tokenizer).__module__.startswith("transformers_modules")
    names = ("generation_config.json", *own.PROCESSORS, *(() if allowed else ("tokenizer_config.json",)))
    for file in (stage / name for name in names if (stage / name).is_file()):
        content = read_json(file)
        if content.pop("auto_map", None) is not None:
            _write_json(file, content)


def _write_provenance(stage: Path, model: nn.Module, report: Any, source: str | None, recipe: Any, format: str) -> None:
    if recipe is not None:
        (stage / "recipe.yaml").write_text(recipe_text(recipe))
    records = report.records if report is not None else []
    layers = layers_of(records)
    plan = next(plans_of(records), {}) | ({} if layers is None else {"layers": layers})
    if plan:
        _write_json(stage / PLAN, plan)
    _write_json(stage / FILE, {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "base_model": recipe.model.id if recipe is not None else model.config._name_or_path,
        "base_told": seen.told if source and (seen := view.of(source)) else [],
        **origin(source, model.config._name_or_path, recipe.model.revision if recipe is not None else None),
        "recipe": recipe.resolved() if recipe is not None else None,
        "changes": list(recipe.changes) if recipe is not None else [],
        "format": format,
        "loads_with": how_to_load(json.loads((stage / "config.json").read_text())),
        "bytes": shards.written_bytes(stage),
        **(report.to_dict() if report is not None else {}),
    })


def recipe_text(recipe: Any) -> str:
    """The recipe with every default written out; comments stay behind: their figures are those of another run."""
    import yaml

    resolved = recipe.resolved()
    del resolved["model"]["trust_remote_code"]          # the command line says so, a recipe cannot
    head = f"# What llmopt {version('llmopt')} ran, every key written out; scores of the result are in README.md.\n"
    return head + yaml.safe_dump(resolved, sort_keys=False)


def how_to_load(config: dict[str, Any]) -> dict[str, str]:
    """For each way of loading, what it gives: "exact", "dense behaviour" or "refused"."""
    per_layer, live = "per_layer_config" in config, "llmopt" in config
    if found := ours(config):
        refused = f"refused: {', '.join(OURS[name] for name in found)}"
        return {"transformers": refused, "trust_remote_code": refused, "import llmopt": "exact"}
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


@naming_arguments
def load(folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu",
         revision: str | None = None, trust_remote_code: bool = False,
         packed: bool | None = None) -> tuple[nn.Module, Any]:
    """(model, tokenizer or None) of a folder or hub name, runtime parts attached; LlmoptError for damaged files.

    packed: quantized weights stay packed in memory (llmopt/quant/README.md); None: as LLMOPT_PACKED says.
    """
    spec = ModelSpec(id=str(folder), dtype=None if dtype == "auto" else dtype, device=str(device), revision=revision,
                     trust_remote_code=trust_remote_code)
    with packing(packed):
        model, tokenizer = load_model(spec)
    if packed:
        check_packed(model, str(folder))
    return model, tokenizer
