"""The place of an output: what may be replaced, and how a whole checkpoint gets its name."""
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmopt.checkpoint.facts import FILE, read_facts
from llmopt.errors import LlmoptError, naming
from llmopt.files import own, shards


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
        raise LlmoptError(f"{output}: is not empty; give --overwrite (overwrite=True in Python) to replace it, or "
                          "another output")
    if strange := own.foreign(output, own.CHECKPOINT):
        raise LlmoptError(f"{output}: holds {', '.join(strange[:9])}, which llmopt did not write; move it "
                          "elsewhere, or choose another output")
    with naming(f"{output}: is not replaced"):
        check_written(output)


def check_written(folder: Path) -> dict[str, Any]:
    """The llmopt.json of a folder; raises LlmoptError for weights that are not those that llmopt wrote."""
    facts = read_facts(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size not in (0, facts["bytes"]):
        raise LlmoptError(f"{folder}: its weights are not those that llmopt wrote ({size:,} bytes, {FILE} says "
                          f"{facts['bytes']:,})")
    return facts


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
        replace(stage, output)


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


def replace(stage: Path, output: Path) -> None:
    """Put `stage` in the place of `output`; the old folder goes only after the new one stands."""
    old = output.with_name(f".{output.name}.llmopt-old-{os.getpid()}")
    if output.exists():
        output.rename(old)
    stage.rename(output)
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.llmopt-old-*"):    # of killed runs too
        if leftover == old or (leftover / FILE).is_file():
            with suppress(OSError):
                own.remove(leftover, own.CHECKPOINT)
