"""Scoring a model larger than memory: its weights stay in their files and are read where they are used.

accelerate does it, on safetensors in place. A packed checkpoint, which transformers would inflate as a whole at its
first forward, is inflated tensor by tensor into a folder that is there for as long as it is scored; of a
Mixture-of-Experts model transformers writes the experts, put together, into the same place.
"""
import glob
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import nn

from llmopt.checkpoint.compressed_tensors import facts, rounded_inputs
from llmopt.checkpoint.facts import FILE
from llmopt.errors import LlmoptError
from llmopt.files import shards, tensors
from llmopt.files.checks import read_json
from llmopt.files.hub import fetch
from llmopt.model import skeleton
from llmopt.model.architectures import SPECS
from llmopt.model.computing import choose, convert
from llmopt.model.loading import load_model, read_config, resolve
from llmopt.model.packing import unpacked
from llmopt.model.ways import view
from llmopt.scale.available import available
from llmopt.specs import ModelSpec

SHARD = "500MB"         # of what is inflated: so much is held at a time


@contextmanager
def opened(spec: ModelSpec, needs_words: bool = True) -> Iterator[tuple[nn.Module, Any]]:
    """(model, tokenizer) to be scored: in memory where it fits, else with its weights on disk.

    needs_words: without a tokenizer it cannot be scored.
    Raises the errors of `load_model`, and LlmoptError where there is no tokenizer, or no room for what is inflated.
    """
    source = resolve(spec)
    if spec.device != "cpu":
        yield _with_tokenizer(spec, needs_words)
        return
    folder = Path(source) if Path(source).is_dir() else fetch(source, spec.revision)
    size = memory_bytes(folder, spec.dtype)
    if size <= available():
        yield _with_tokenizer(spec, needs_words)
        return
    if fact := _too_full(folder, size if _is_inflated(folder) else 0):
        raise LlmoptError(fact)
    with scratch(folder) as work:
        if view.of(folder):
            spec = spec.at(str(written(folder, work / "dense")))
        elif _is_packed(folder):
            spec = replace(spec, id=str(inflate(folder, work / "dense")))
        yield _with_tokenizer(spec, needs_words, device_map=on_disk(spec), offload_folder=str(work))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that is gone afterwards; those of processes that were killed go first."""
    home, kind = beside(folder), f".{folder.name}.llmopt-eval-{platform.node()}@"
    for old in home.glob(f"{glob.escape(kind)}*"):
        process = re.fullmatch(r"(\d{1,9})-\w+", old.name.removeprefix(kind))
        if process and not psutil.pid_exists(int(process[1])):
            shutil.rmtree(old, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{kind}{os.getpid()}-", dir=home) as work:
        yield Path(work)


def on_disk(spec: ModelSpec) -> dict[str, str]:
    """A device map: all modules with weights on the disk, but for the embeddings, which tell where inputs belong."""
    _, config = read_config(spec)
    model = skeleton.skeleton(config, config.dtype, spec.trust_remote_code)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: "cpu" if module in ends else "disk" for name, module in model.named_modules()
            if module._parameters or module._buffers}


def _with_tokenizer(spec: ModelSpec, needs_words: bool, **placement) -> tuple[nn.Module, Any]:
    model, tokenizer = load_model(spec, **placement)
    choose(model, spec.compute_dtype, spec.device)
    convert(model, available())
    if tokenizer is None and needs_words:
        raise LlmoptError(f"{spec.id}: there is no tokenizer, and lm-eval needs one")
    return model, tokenizer


def obstacle(model: ModelSpec, output: Path, packed: bool) -> str | None:
    """Why a run's models could not be scored in the end: larger than memory, and than what is free on the disk.

    packed: the output will be.
    """
    source = Path(resolve(model))
    if model.device != "cpu" or not source.is_dir():
        return None
    size = memory_bytes(source, model.dtype)
    if size <= available():
        return None
    return _too_full(source, size if _is_inflated(source) else 0) or _too_full(output, size if packed else 0)


def memory_bytes(folder: Path, dtype: str | None) -> int:
    """Bytes that a folder's weights take while they are computed with, as `dtype` or in the types of the files."""
    view.check(folder)
    places, size = view.places(folder), getattr(torch, dtype or _dtype(folder)).itemsize
    shapes = tensors.read({name: place for name, place in places.items() if name.endswith(".weight_shape")})
    pairs = tensors.read({name: place for name, place in places.items() if name.endswith(".weight_packed")
                          and name.replace("_packed", "_shape") not in places})             # two numbers in a byte
    return (view.dense_bytes(folder, dtype) + sum(size * int(shape.prod()) for shape in shapes.values())
            + sum(2 * size * packed.numel() for packed in pairs.values()))


def _too_full(folder: Path, size: int) -> str | None:
    """The message if `size` bytes have no place beside `folder`; None if they have."""
    free = psutil.disk_usage(str(beside(folder))).free
    return None if size <= free else (
        f"{folder}: takes {size / 1e9:.1f} GB to score; {available() / 1e9:.1f} GB of memory are available, and "
        f"{free / 1e9:.1f} GB of the disk")


def beside(folder: Path) -> Path:
    """The place for files of an evaluation: the folder around `folder`, or the working directory."""
    home = next(above for above in folder.absolute().parents if above.is_dir())
    return home if os.access(home, os.W_OK) else Path.cwd()


def _is_inflated(folder: Path) -> bool:
    """True for weights that cannot be read from their files as they are used."""
    return view.of(folder) is not None or _is_packed(folder) or _has_experts(folder)


def _has_experts(folder: Path) -> bool:
    known = SPECS.get(read_json(folder / "config.json").get("model_type"))
    return known is not None and not known.ffn_out


def _is_packed(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / "config.json")


def _dtype(folder: Path) -> str:
    """The type that config.json names; float32 where it names none that there is."""
    config = read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype) else "float32"


def inflate(folder: Path, into: Path) -> Path:
    """Write a packed checkpoint of llmopt as a dense one; raises LlmoptError for one that another tool has made."""
    config = read_json(folder / "config.json")
    if not (folder / FILE).is_file():
        raise LlmoptError(f"{folder}: does not fit into memory, and its weights, quantized by another tool, cannot be "
                          "read from disk one by one; score it on a machine with more memory")
    packed = config.pop("quantization_config")
    if rounded_inputs(packed):
        raise LlmoptError(f"{folder}: does not fit into memory, and what its weights read can be rounded only there; "
                          "score it on a machine with more memory")
    into.mkdir()
    dtype, places, writer = getattr(torch, _dtype(folder)), tensors.places(folder), shards.Writer(into, SHARD)
    for name, known in facts(packed).items():
        stem = f"{name}.weight"
        parts = {part: places.pop(part) for part in [p for p in places if p == stem or p.startswith(f"{stem}_")]}
        read = tensors.read(parts)
        if f"{stem}_global_scale" in read:
            known["whole"] = read[f"{stem}_global_scale"].item()
        writer.add({stem: unpacked(read, stem, known).dequantize(dtype)})
    _finish(places, writer, folder, into)
    (into / "config.json").write_text(json.dumps(config))
    return into


def written(folder: Path, into: Path) -> Path:
    """Write the tensors of a view, which are made when they are read, into files that hold them as they are."""
    into.mkdir()
    _finish(view.places(folder), shards.Writer(into, SHARD), folder, into)
    return into


def _finish(places: tensors.Places, writer: shards.Writer, folder: Path, into: Path) -> None:
    """Write these tensors one by one, and the small files beside them."""
    for name in places:
        writer.add(tensors.read({name: places[name]}))
    writer.close()
    for file in folder.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, into / file.name)

