"""`model.save_pretrained` of a compressed model: the checkpoint of `llmopt.save`, beside whatever the folder holds.

Trainers and accelerate save through this method, and `push_to_hub` does. Stock transformers would write dense weights
under it, with scales that nothing reads any more.
"""
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.checkpoint.card import write_card
from llmopt.checkpoint.place import vanishing
from llmopt.checkpoint.save import Weights, fill
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.model.loaded import is_ours, with_codes
from llmopt.model.modeling import heads_fit
from llmopt.model.unfinished import check_finished
from llmopt.model.weights import coded
from llmopt.runtime import runtime_config

NOT_TAKEN = {"push_to_hub": "model.push_to_hub(REPO), or `llmopt push DIR REPO` afterwards", "variant": "no variant",
             "distributed_checkpoint": "llmopt.save(model, DIR) in one process"}


def save_pretrained(model: nn.Module, stock: Callable[..., Any], save_directory: str | os.PathLike,
                    is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None,
                    max_shard_size: str | int = "50GB", **options: Any) -> None:
    """Write what `llmopt.save` writes into a folder; other files in there stay.

    stock: transformers' own method, which writes models that nothing was done to, and adapters. options: its other
    arguments; raises LlmoptError for those that cannot be served, and for weights that are not the model's own.
    """
    check_finished(model)
    if getattr(model, "_hf_peft_config_loaded", False) or not is_compressed(model):
        stock(save_directory, is_main_process=is_main_process, state_dict=state_dict, max_shard_size=max_shard_size,
              **options)
        return
    for key, instead in NOT_TAKEN.items():
        if options.get(key):
            raise LlmoptError(f"save_pretrained({key}={options[key]!r}) cannot write a compressed model; use {instead}")
    if state_dict is not None:
        _check_own(model, state_dict)
    if is_main_process:
        limit = max_shard_size if isinstance(max_shard_size, str) else f"{max_shard_size}B"
        _write_beside(Path(save_directory).expanduser(), model, limit)


def is_compressed(model: nn.Module) -> bool:
    """True if transformers alone would write something else than this model."""
    config = model.config
    loaded = getattr(config, "llmopt", None) or is_ours(model)
    return bool(loaded or coded(model) or runtime_config(model)["steps"] or config.is_heterogeneous
                or not heads_fit(config, config.num_attention_heads))


def _check_own(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Raise LlmoptError unless the tensors are those of the model."""
    own = model.state_dict()
    for name, tensor in given.items():
        if name not in own or (tensor is not own[name] and not torch.equal(tensor.to(own[name].device), own[name])):
            raise LlmoptError(f"save_pretrained(state_dict=...): {name} is not the model's own, and a compressed model "
                              "is written from its own weights; load them into the model first (load_state_dict)")


def _write_beside(folder: Path, model: nn.Module, max_shard_size: str) -> None:
    """Write and verify the checkpoint in a hidden folder inside `folder`, then move its files up."""
    if folder.is_file():
        raise LlmoptError(f"{folder}: is a file; an output is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f".llmopt-partial-{os.getpid()}"
    with vanishing(stage, folder), with_codes(model):
        stage.mkdir()
        fill(stage, model, None, weights=Weights(model, "portable"), max_shard_size=max_shard_size)
        write_card(stage)
        shards.sync(stage)
        fresh = {file.name for file in stage.iterdir()}
        for old in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")):
            if old.name not in fresh:                               # of an earlier save, as transformers does
                old.unlink()
        for name in fresh - ({"README.md"} if (folder / "README.md").exists() else set()):
            (stage / name).replace(folder / name)
