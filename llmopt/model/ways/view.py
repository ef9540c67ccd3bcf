"""A model that is no folder of plain safetensors, seen as one: the weights stay where they are, and are made when they
are read.

A view is a folder in the user's cache with config, tokenizer and card (ways/write.py), and view.json, which tells where
the weights lie and what is done to them: made from a GGUF file, from codes and scales, merged with an adapter.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.files import cache, tensors
from llmopt.files.checks import check_folder, read_json, refusals, weight_files
from llmopt.files.gguf_head import read_head
from llmopt.files.json_shapes import check_shape
from llmopt.model.ways import adapter, dequantized, gguf

FILE, KIND = "view.json", "views"
SHAPE = {"weights": str, "told": [str], "dequantize": dict | None, "adapter": str | None}


@dataclass(frozen=True)
class View:
    """weights: a GGUF file, or the folder of the model. told: what it was made from, in words for its users.

    dequantize: the quantization_config by which codes become weights. adapter: the folder of one that is merged.
    """

    weights: str
    told: list[str]
    dequantize: dict[str, Any] | None = None
    adapter: str | None = None

    @property
    def is_gguf(self) -> bool:
        """True where the weights lie in a GGUF file."""
        return Path(self.weights).is_file()


def of(folder: str | Path) -> View | None:
    """What view.json says, if `folder` is a view of this user's cache; no other folder can be one."""
    folder = Path(folder)
    try:
        if not (folder / FILE).is_file() or folder.parent.resolve() != cache.folder(KIND).resolve():
            return None
    except RuntimeError:
        return None
    content = read_json(folder / FILE)
    check_shape(content, SHAPE, str(folder / FILE))
    return View(**{key: content[key] for key in View.__dataclass_fields__})


def places(folder: Path) -> tensors.Places:
    """Every tensor of a folder, whether it lies there or a view tells how it is made."""
    view = of(folder)
    if view is None:
        return tensors.places(folder)
    found = dense_places(view, folder)
    return with_adapter(found, view, folder)[0] if view.adapter else found


def dense_places(view: View, folder: Path) -> tensors.Places:
    """The tensors of a view before an adapter is merged; folder: where its config lies."""
    weights = Path(view.weights)
    if weights.is_file():
        return gguf.places(read_head(weights), _config(folder))
    found = tensors.places(weights)
    return found if view.dequantize is None else dequantized.dense(found, view.dequantize, _config(folder).dtype,
                                                                   view.weights)


def with_adapter(found: tensors.Places, view: View, folder: Path) -> tuple[tensors.Places, str]:
    from llmopt.model.auto import auto_class

    config = _config(folder)
    with refusals(f"{view.weights}: the model cannot be made"), torch.device("meta"):
        model = auto_class(config).from_config(config)
    return adapter.merged(found, Path(str(view.adapter)), model, view.weights)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    with refusals(f"{folder}: the model cannot be loaded"):
        return AutoConfig.from_pretrained(folder)


def files(folder: Path) -> list[Path]:
    """The files with the weights of a folder."""
    view = of(folder)
    if view is None:
        return weight_files(folder)
    weights = Path(view.weights)
    merged = [Path(view.adapter) / adapter.FILE] if view.adapter else []
    return [*([weights] if weights.is_file() else weight_files(weights)), *merged]


def dense_bytes(folder: Path, dtype: str | None = None) -> int:
    """Bytes of a folder's weights in memory, as `dtype` or in their own types."""
    if of(folder) is None:
        return tensors.dense_bytes(folder, dtype)
    return tensors.bytes_of(places(folder), dtype)


def check(folder: Path) -> None:
    """Raise LlmoptError for a folder that is no model; a view was looked at when it was opened."""
    if of(folder) is None:
        check_folder(folder)
