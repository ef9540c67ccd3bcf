"""The names of all tasks, as shipped in task_names.xz: lm-eval takes ten seconds to list them, completion has none.

`python -m llmopt_evals.task_names` writes the file anew, from the tasks of llmopt and of the lm-eval that is installed.
"""
import lzma
from pathlib import Path

FILE = Path(__file__).with_name("task_names.xz")
BESIDE = ("fidelity",)              # scores that are asked for like a task, and are none of lm-eval's


def task_names() -> list[str]:
    """The shipped names, in order."""
    return lzma.decompress(FILE.read_bytes()).decode().split("\n")


def indexed_names() -> list[str]:
    """The names that llmopt and the installed lm-eval know now, in order."""
    from lm_eval.tasks import TaskManager

    from llmopt_evals.world import tasks_path

    return sorted({*TaskManager(include_path=str(tasks_path())).all_tasks, *BESIDE})


if __name__ == "__main__":
    FILE.write_bytes(lzma.compress("\n".join(indexed_names()).encode(), preset=9 | lzma.PRESET_EXTREME))
