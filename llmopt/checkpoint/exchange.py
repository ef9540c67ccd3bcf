"""Checkpoints to and from the Hugging Face hub: only whole ones go up, and none takes its name before it is whole."""
import shutil
from pathlib import Path

from llmopt.checkpoint.card import card_for
from llmopt.checkpoint.facts import FILE
from llmopt.checkpoint.place import check_written, prepare_output, replace
from llmopt.checkpoint.shareable import shareable
from llmopt.errors import LlmoptError
from llmopt.files import own, shards
from llmopt.files.checks import check_folder
from llmopt.files.hub import download, upload

GO_ON = "what has arrived is kept in {}, the same command goes on with it"


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a finished checkpoint of llmopt; the page's address. Raises LlmoptError for any other folder.

    Of the paths of this machine that its files name, only the last parts go up.
    """
    if (folder / own.PARTIAL).exists():
        raise LlmoptError(f"{folder}: holds some blocks only (--max-blocks), which is no model")
    check_folder(folder)
    check_written(folder)
    return upload(folder, repo, private, shareable(folder) | {"README.md": card_for(folder, repo)})


def pull(repo: str, folder: Path, revision: str | None = None, overwrite: bool = False) -> tuple[Path, str]:
    """Download a model of the hub into `folder`; (where it is, the commit).

    Files that llmopt knows are taken: configs, safetensors, tokenizer, provenance. They arrive in a hidden folder
    beside, which is looked at and then renamed; when cut off, it stays, and the next call goes on with it.
    Raises LlmoptError for a folder in use, a name that is not to be had, and files that are no model.
    """
    output = prepare_output(folder, None, overwrite)
    stage = output.with_name(f".{output.name}.llmopt-pull")
    stage.mkdir(parents=True, exist_ok=True)
    try:
        commit = download(repo, revision, stage, own.CHECKPOINT.fullmatch)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {GO_ON.format(stage)}") from error
    except LlmoptError as error:
        if not any(file.is_file() for file in stage.iterdir()):
            shutil.rmtree(stage)
            raise
        raise LlmoptError(f"{error}; {GO_ON.format(stage)}") from error
    shutil.rmtree(stage / ".cache", ignore_errors=True)         # huggingface_hub's notes on what has arrived
    try:
        check_folder(stage)
        if (stage / FILE).is_file():
            check_written(stage)
    except LlmoptError as error:
        shutil.rmtree(stage)
        raise LlmoptError(str(error).replace(str(stage), repo)) from error
    shards.sync(stage)
    replace(stage, output)
    return output, commit
