"""Where the world keeps its files."""

from pathlib import Path


def reference_path(name: str = "llmopt/reference") -> Path:
    """Folder of the trained reference model of this name (a Hugging Face checkpoint with its tokenizer)."""
    return Path(__file__).parent / name.removeprefix("llmopt/")


def tasks_path() -> Path:
    """Folder of the lm-eval tasks, for `--include_path`."""
    return Path(__file__).parent.parent / "tasks"
