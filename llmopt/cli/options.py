"""Options that several commands take, and what is checked of them before any work."""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.scale.processes import Ranks

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
TRUST = click.option("--trust-remote-code", is_flag=True, help="Let code of the model, or of task files, run.")
COUNT = click.IntRange(min=1)
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                    help="Of the data, and of what methods draw.")
ANEW = click.option("--anew", is_flag=True, help="Measure scores of dense models again that are kept from earlier.")
DATA = click.option("--data", metavar="WORD", help="A file, self (sampled from the model), world, or a dataset of the "
                    "hub.  [default: self; embedded models: world]")


class HomePath(click.Path):
    """A path in which `~` stands for the user's home wherever it comes from; shells leave it in `--text=~/x`."""

    def convert(self, value, param, ctx):
        return super().convert(os.path.expanduser(value), param, ctx)


FILE = HomePath(path_type=Path)


WAYS = {"adapter": None, "dequantize": False, "gguf_file": None}         # options on a model, with their defaults
MODEL_GROUP = ("dtype", "compute_dtype", "device", "revision", *WAYS, "trust_remote_code")


def ways(command):
    """Options on a model that is no folder of plain safetensors: see llmopt/model/README.md."""
    for option in (
        click.option("--gguf-file", metavar="NAME", help="The GGUF file to read in a folder or hub model; MODEL can be "
                     "a GGUF file itself."),
        click.option("--dequantize", is_flag=True, help="Read a model in fp8, mxfp4 or compressed-tensors as a "
                     "dense one."),
        click.option("--adapter", metavar="FOLDER", help="Merge this LoRA adapter of peft into the weights."),
    ):
        command = option(command)
    return command


def model_options(command):
    """Options on loading a MODEL argument: the keys of a recipe's `model` section."""
    for option in (TRUST, ways, click.option("--revision", help="Branch, tag or commit of a hub name."),
                   click.option("--dtype", help="fp32, bf16 or fp16; default: the checkpoint's."),
                   click.option("--compute-dtype", default="auto", show_default=True,
                                help="fp32, bf16 or fp16 to compute in; auto: what is fast here."),
                   click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")):
        command = option(command)
    return command


def check_target(file: Path | None) -> None:
    """Raise LlmoptError, before any work, for a result file that could not be written after it."""
    if file and (file.exists() and not file.is_file() or not file.absolute().parent.is_dir()):
        raise LlmoptError(f"{file}: " + ("is a folder" if file.is_dir() else "is a device, socket or FIFO, not a file"
                                         if file.exists() else "its folder does not exist"))


def join(device: str) -> Ranks:
    """The processes of this run; raises LlmoptError for a device that all of them would take."""
    from llmopt.scale import processes

    return processes.join(device)
