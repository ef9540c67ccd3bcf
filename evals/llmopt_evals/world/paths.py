"""Where the world keeps its files."""

from pathlib import Path


def reference_path() -> Path:
    """Folder of the trained reference model (a Hugging Face checkpoint with its tokenizer)."""
    return Path(__file__).parent / "reference"


def tasks_path() -> Path:
    """Folder of the lm-eval tasks, for `--include_path`."""
    return Path(__file__).parent.parent / "tasks"
