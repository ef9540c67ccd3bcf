"""The Hugging Face hub: whether a name can be had, the files beside a model, and uploads; each refusal in one line."""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from llmopt.errors import LlmoptError
from llmopt.files.checks import indexed

SECONDS = 10            # for the first answer; without a network the error comes at once


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Every way in which the hub says no becomes one line."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise LlmoptError(f"{name}: not to be had with this token; log in with `hf auth login`, or set HF_TOKEN "
                              "(a private or misspelt name looks the same)") from error
        raise LlmoptError(f"{name}: {error.server_message or str(error).splitlines()[0]}") from error
    except (HTTPError, HFValidationError, OSError) as error:
        raise LlmoptError(f"{name}: {str(error).splitlines()[0]}") from error


def check_name(name: str, revision: str | None = None) -> None:
    """Raise LlmoptError for a hub name that is neither cached nor to be had; asks once, without the hub's retries."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    with _asking(f"{name}: not a folder, and not to be had from the hub"):
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            HfApi().model_info(name, revision=revision, timeout=SECONDS)


def companion(source: str, name: str, revision: str | None = None) -> Path | None:
    """The file `name` beside the weights of a folder or hub model; None where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (HfHubHTTPError, OSError):       # not there, or not to be had without a network
        return None


def fetch(name: str, revision: str | None = None) -> Path:
    """The local folder of a hub model's configs, tokenizer and those safetensors that transformers would open."""
    from huggingface_hub import snapshot_download

    with _asking(name):
        first = ["model.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=first, ignore_patterns=["*/*"]))
        index = folder / "model.safetensors.index.json"
        if index.is_file() and not (folder / "model.safetensors").is_file():
            shards = [escape(file) for file in indexed(index) if file.endswith(".safetensors")]
            snapshot_download(name, revision=folder.name, allow_patterns=shards)        # of the same commit
        return folder


def download(repo: str, revision: str | None, stage: Path, wanted: Callable[[str], object]) -> str:
    """Put the files of a repository whose names are `wanted` into the folder `stage`; the commit that they are of.

    A file that has arrived in an earlier try, and is still that of the commit, is not fetched again.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _asking(repo):
        found = HfApi().model_info(repo, revision=revision, timeout=SECONDS)
        names = [file.rfilename for file in found.siblings or () if wanted(file.rfilename)]
        if not names:
            raise LlmoptError(f"{repo}: holds no file of a model that llmopt reads")
        for old in [file for file in stage.rglob("*") if file.is_file()]:
            name = old.relative_to(stage)
            if name.parts[0] != ".cache" and name.as_posix() not in names:
                old.unlink()                                    # of another commit
        snapshot_download(repo, revision=found.sha, local_dir=stage, allow_patterns=[escape(name) for name in names])
    return str(found.sha)


def upload(folder: Path, repo: str, private: bool = False, texts: Mapping[str, str] | None = None) -> str:
    """Put the folder's files, but hidden ones, into `repo` in one commit; the page's address.

    texts: {file: its text} in the place of the folder's own.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    contents = {str(name): folder / name for name in names if not any(part.startswith(".") for part in name.parts)}
    contents |= {name: text.encode() for name, text in (texts or {}).items()}
    files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    api = HfApi()
    with _asking(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, files, commit_message="Upload by llmopt").repo_url)
