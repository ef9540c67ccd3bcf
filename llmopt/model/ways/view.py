"""A model that is no folder of plain safetensors, seen as one: the small files are written, the weights stay where
they are.

A view is a folder in the user's cache with config, tokenizer and card, and view.json, which tells where the weights
lie and what is done to them: made from a GGUF file, from codes and scales, merged with an adapter. Its tensors
(`places`) are made one by one when they are read. A view is named by all that it depends on, and made once.
"""
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, nearest
from llmopt.files import cache, own, tensors
from llmopt.files.checks import check_folder, read_json, refusals, weight_files
from llmopt.files.gguf_head import is_gguf, read_head
from llmopt.files.hub import check_name, companion
from llmopt.files.json_shapes import check_shape
from llmopt.model.ways import gguf
from llmopt.specs import ModelSpec

FILE, KIND = "view.json", "views"
SHAPE = {"weights": str, "told": [str], str: object}
COPIED = ("generation_config.json", "README.md", *own.LICENCES)


@dataclass(frozen=True)
class View:
    """weights: a GGUF file, or the folder of the model. told: what was done to it, in sentences for its users."""

    weights: str
    told: list[str]

    @property
    def is_gguf(self) -> bool:
        return Path(self.weights).is_file()


def needs_view(spec: ModelSpec) -> bool:
    """True for a model that is not read as it lies there."""
    return bool(spec.gguf_file) or is_gguf(Path(spec.id).expanduser()) or _only_gguf(spec)


def _only_gguf(spec: ModelSpec) -> bool:
    folder = Path(spec.id).expanduser()
    return folder.is_dir() and not any(folder.glob("*.safetensors*")) and any(folder.glob("*.gguf"))


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


def opened(spec: ModelSpec) -> Path:
    """The view of a model, written if it is not there yet; raises LlmoptError for whatever is wrong with its files."""
    file = _gguf_file(spec)
    return _kept(file.name, {"file": _mark(file)}, lambda folder: _write_gguf(file, folder))


def _write_gguf(file: Path, folder: Path) -> View:
    head = read_head(file)
    gguf.check(head)
    gguf.write_companions(head, folder)
    for name in own.LICENCES:
        if (head.file.parent / name).is_file():
            shutil.copyfile(head.file.parent / name, folder / name)
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


def _kept(name: str, key: dict[str, Any], write: Any) -> Path:
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


def places(folder: Path) -> tensors.Places:
    """Every tensor of a folder, whether it lies there or a view tells how it is made."""
    view = of(folder)
    if view is None:
        return tensors.places(folder)
    from transformers import AutoConfig

    head = read_head(Path(view.weights))
    with refusals(f"{view.weights}: the model cannot be loaded"):
        config = AutoConfig.from_pretrained(folder)
    return gguf.places(head, config)


def files(folder: Path) -> list[Path]:
    """The files with the weights of a folder."""
    view = of(folder)
    return weight_files(folder) if view is None else [Path(view.weights)]


def dense_bytes(folder: Path, dtype: str | None = None) -> int:
    """Bytes of a folder's weights in memory, as `dtype` or in their own types."""
    if of(folder) is None:
        return tensors.dense_bytes(folder, dtype)
    return tensors.bytes_of(places(folder), dtype)


def check(folder: Path) -> None:
    """Raise LlmoptError for a folder that is no model; a view was looked at when it was opened."""
    if of(folder) is None:
        check_folder(folder)
