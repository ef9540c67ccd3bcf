"""Writing the view of a model (ways/view.py): its small files, and what is to be done to its weights.

A view is named by all that it depends on: the files of the model and of the adapter, and what was asked for. It is
written once, into a folder that gets its name when all is there.
"""
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, nearest
from llmopt.files import cache, own, tensors
from llmopt.files.checks import check_folder, read_json, weight_files
from llmopt.files.gguf_head import is_gguf, read_head
from llmopt.files.hub import check_name, companion, fetch
from llmopt.model.ways import adapter, dequantized, gguf
from llmopt.model.ways.view import FILE, KIND, View, dense_places, with_adapter
from llmopt.specs import ModelSpec

LINKED = ("generation_config.json", "README.md", *own.LICENCES)
FLOATS = ("float32", "bfloat16", "float16")


def needs_view(spec: ModelSpec) -> bool:
    """True for a model that is not read as it lies there."""
    return bool(spec.dequantize or spec.adapter) or needs_gguf(spec)


def needs_gguf(spec: ModelSpec) -> bool:
    """True for a model that lies in a GGUF file."""
    given = Path(spec.id).expanduser()
    return bool(spec.gguf_file) or is_gguf(given) or (
        given.is_dir() and not any(given.glob("*.safetensors*")) and any(given.glob("*.gguf")))


def opened(spec: ModelSpec) -> Path:
    """The view of a model, written if it is not there yet; raises LlmoptError for whatever is wrong with its files."""
    weights = _weights(spec)
    beside = Path(spec.adapter).expanduser().absolute() if spec.adapter else None
    found = [weights] if weights.is_file() else [weights / "config.json", *weight_files(weights)]
    if beside:
        found += [beside / name for name in (adapter.CONFIG, adapter.FILE)]
    key = {"files": [_mark(file) for file in found if file.is_file()], "adapter": beside and str(beside),
           "dequantize": spec.dequantize}
    return _kept(weights.name, key, lambda folder: _write(weights, spec, beside, folder))


def _weights(spec: ModelSpec) -> Path:
    """The GGUF file or the folder that a spec means; a model of the hub is fetched."""
    if needs_gguf(spec):
        return _gguf_file(spec)
    given = Path(spec.id).expanduser()
    folder = given.absolute() if given.is_dir() else fetch(spec.id, spec.revision)
    check_folder(folder)
    return folder


def _write(weights: Path, spec: ModelSpec, beside: Path | None, folder: Path) -> View:
    """Write all but the weights into `folder`."""
    view = _write_gguf(weights, folder) if weights.is_file() else _write_dense(weights, spec.dequantize, folder)
    if beside is None:
        return view
    view = replace(view, adapter=str(beside))
    told = with_adapter(dense_places(view, folder), view, folder)[1]
    words = [file for file in beside.glob("*") if own.TOKENIZERS.fullmatch(file.name)] \
        if (beside / "tokenizer.json").is_file() else []
    if words:
        for file in [file for file in folder.iterdir() if own.TOKENIZERS.fullmatch(file.name)]:
            file.unlink()
    for file in words:
        (folder / file.name).symlink_to(file)
    return replace(view, told=[*view.told, f"{told}{', whose tokenizer was taken' if words else ''}, merged into it"])


def _write_dense(weights: Path, dequantize: bool, folder: Path) -> View:
    """Link the small files of a model's folder, and write the config of the dense one."""
    config = read_json(weights / "config.json")
    method = dequantized.method_of(config)
    if dequantize and method is None:
        raise LlmoptError(f"{weights}: is not quantized; leave dequantize out")
    if method and not dequantize:
        raise LlmoptError(f"{weights}: the model is already quantized by {method}; {dequantized.advice(method)}")
    if config.get("llmopt"):
        raise LlmoptError(f"{weights}: was written with steps that act while the model runs; start from the model that "
                          "it was made from")
    settings = config.pop("quantization_config", config.pop("compression_config", None))
    if str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.") not in FLOATS:
        config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in weights.iterdir():
        if file.is_file() and (own.TOKENIZERS.fullmatch(file.name) or file.name in LINKED or file.suffix == ".py"):
            (folder / file.name).symlink_to(file)
    if (weights / "additional_chat_templates").is_dir():
        (folder / "additional_chat_templates").symlink_to(weights / "additional_chat_templates")
    if not method:
        return View(str(weights), [])
    dequantized.refuse_unknown(method, str(weights))
    view = View(str(weights), [], settings)
    count = sum(isinstance(place, tensors.Made) for place in dense_places(view, folder).values())
    return replace(view, told=[f"the checkpoint {weights.name}, quantized by {method}: {count} weights were "
                               "dequantized, and what they had lost stays lost"])


def _write_gguf(file: Path, folder: Path) -> View:
    head = read_head(file)
    gguf.check(head)
    gguf.write_companions(head, folder)
    for name in own.LICENCES:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    kinds = ", ".join(f"{count} {kind}" for kind, count in head.types().items())
    told = f"the GGUF file {file.name} ({file.stat().st_size / 1e6:,.2f} MB; tensors by type: {kinds})"
    lossy = head.types().keys() - gguf.PLAIN.keys()
    return View(str(file), [f"{told}, which was quantized already" if lossy else told])


def _gguf_file(spec: ModelSpec) -> Path:
    """The GGUF file that a spec means: itself, a file in its folder, or one of a model of the hub."""
    given = Path(spec.id).expanduser()
    if given.is_file():
        if spec.gguf_file and spec.gguf_file != given.name:
            raise LlmoptError(f"{spec.id} is a file already; gguf_file names one in a folder, leave it out")
        return given.absolute()
    if given.is_dir():
        return _in_folder(given.absolute(), spec.gguf_file)
    check_name(spec.id, spec.revision)
    found = companion(spec.id, str(spec.gguf_file), spec.revision)
    if found is None:
        raise LlmoptError(f"{spec.id}: there is no {spec.gguf_file} in this repository, or it cannot be had")
    return found


def _in_folder(folder: Path, name: str | None) -> Path:
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if name is None and len(found) > 1:
        raise LlmoptError(f"{folder} holds {len(found)} GGUF files: give the file itself, or gguf_file, one of "
                          f"{', '.join(found)}")
    file = folder / (name or found[0])
    if not file.is_file() or file.parent != folder:
        raise LlmoptError(f"{folder}: there is no file {name!r}{nearest(str(name), found)}"
                          + (f". GGUF files here: {', '.join(found)}" if found else ""))
    return file


def _mark(file: Path) -> list[Any]:
    """What tells a file from another, and from itself after a change."""
    known = file.stat()
    return [str(file.resolve()), known.st_size, known.st_mtime_ns]


def _kept(name: str, key: dict[str, Any], write: Callable[[Path], View]) -> Path:
    """The folder of a view, made by `write` in a folder of its own that gets its name at the end."""
    key = key | {"versions": [version("llmopt"), version("transformers")]}
    try:
        home = cache.folder(KIND)
        place = home / f"{name}-{cache.digest(key)[:12]}"
        if (place / FILE).is_file():
            return place
        home.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    except (OSError, RuntimeError) as error:
        raise LlmoptError(f"{name}: its config and tokenizer are kept in a cache, which cannot be written to "
                          f"({error}); name another folder by {cache.VARIABLE}") from error
    try:
        view = write(stage)
        (stage / FILE).write_text(json.dumps(vars(view), indent=2) + "\n")
        stage.chmod(0o755)
        with suppress(OSError):                 # another process was faster
            os.rename(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return place
