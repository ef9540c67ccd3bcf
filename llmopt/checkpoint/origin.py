"""Where a model came from: its name on the hub, and the licence that its card gives."""
import re
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import read_json
from llmopt.files.hub import companion
from llmopt.recipe.yaml_lines import read_yaml

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FOLDERS = {"checkpoint", "checkpoints", "data", "home", "mnt", "model", "models", "out", "output", "outputs", "results",
           "root", "runs", "tmp", "workspace"}       # first words of paths that are read like a name of the hub
LICENCE = ("license_name", "license_link")          # what a card says beside `license: other`


def origin(source: str | None, config_name: str, revision: str | None) -> dict[str, Any]:
    """Entries of llmopt.json: `base_repo`, `base_ancestor`, `base_licence`, `base_licence_more`.

    source: the folder or hub name that was compressed; None where only a model in memory is known, whose config says
    `config_name`. base_repo is None for a folder, whose path is nobody's business; base_ancestor is then the model of
    the hub that the folder says it was made from, so far as it says so.
    """
    source = source or (config_name if _is_cached(config_name) else None)
    head = _front_matter(source, revision) if source else {}
    repo = _repo(source) if source else None
    more = {key: str(head[key]) for key in LICENCE if head.get(key)}
    return {"base_repo": repo, "base_ancestor": None if repo or source is None else _ancestor(Path(source), head),
            "base_licence": str(head["license"]) if head.get("license") else None,
            **({"base_licence_more": more} if more else {})}


def _repo(source: str) -> str | None:
    """The hub's name for a source: itself, or that of the cached snapshot which it is; None for other folders."""
    if not Path(source).exists():
        return source
    parts = Path(source).absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return "/".join(parts[-3].split("--")[1:])
    return None


def _is_cached(name: str) -> bool:
    """True for the name of a model that was read from the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return not Path(name).exists() and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _ancestor(folder: Path, head: dict[str, Any]) -> str | None:
    """The model of the hub that a local folder was made from, by its config.json or its card."""
    file = folder / "config.json"
    said = (read_json(file).get("_name_or_path") if file.is_file() else None, head.get("base_model"))
    return next((name for name in said if isinstance(name, str) and _is_name(name)), None)


def _is_name(name: str) -> bool:
    return bool(REPO.fullmatch(name)) and name.split("/")[0].lower() not in FOLDERS


def _front_matter(source: str, revision: str | None) -> dict[str, Any]:
    """The facts at the head of the card of a folder or hub model; nothing where there are none to be read."""
    card = companion(source, "README.md", revision)
    if card is None:
        return {}
    parts = re.split(r"^---\s*$", card.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        head = read_yaml(parts[1], str(card))[0] if len(parts) > 2 and not parts[0].strip() else {}
    except LlmoptError:
        return {}
    return head if isinstance(head, dict) else {}
