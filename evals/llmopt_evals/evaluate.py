"""Scores from lm-eval: the tasks of the embedded world without its 14,000-name index, every other task by name."""
import json
import os
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from llmopt.method import LlmoptError, nearest
from llmopt_evals.world import tasks_path


def evaluate(model: Any, tasks: list[str], tokenizer: Any = None, limit: int | None = None, batch_size: int = 16,
             device: str = "cpu", metadata: dict | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """lm-eval's results for a model folder, hub name or loaded model; raises LlmoptError for an unknown task."""
    from lm_eval import simple_evaluate

    from llmopt_evals.lm import LlmoptLM

    manager = task_manager(tasks)
    with _quiet():
        lm = LlmoptLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device, dtype="auto",
                      trust_remote_code=trust_remote_code)
        try:
            return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0,
                                   metadata=metadata or {}, random_seed=0, numpy_random_seed=0, torch_random_seed=0,
                                   fewshot_random_seed=0)
        except OSError as error:                        # no network, no such dataset, a disk in trouble
            raise LlmoptError(f"the tasks {', '.join(tasks)} cannot be run: {str(error).splitlines()[0]}") from error


def task_manager(tasks: list[str]) -> Any:
    """A manager that knows `tasks`; lm-eval's own index (12 to 20 s) is read only if one of them is not ours."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        ours = TaskManager(include_path=str(tasks_path()), include_defaults=False)
        if set(tasks) <= set(ours.all_tasks):
            return ours
        manager = TaskManager(include_path=str(tasks_path()))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        names = ours.all_tasks if "world" in unknown[0] else manager.all_tasks
        raise LlmoptError(f"there is no task {unknown[0]!r}{_close(unknown[0], names)}")
    return manager


def _close(word: str, names: list[str]) -> str:
    return nearest(word, names) if len(names) < 50 else nearest(word, names).split(". Choices")[0]


def figures(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) rows, groups first, in lm-eval's order; standard errors left out."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric = key.split(",")[0]
            if "," in key and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                rows.append((task, metric, float(value)))
    return rows


def write_results(results: dict[str, Any], path: Path) -> None:
    """The results as JSON, written beside and renamed."""
    from lm_eval.utils import handle_non_serializable

    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps({k: v for k, v in results.items() if k != "samples"}, indent=2,
                                 default=handle_non_serializable) + "\n")
    os.replace(beside, path)


@contextmanager
def _quiet():
    """lm-eval talks on stdout, warns about what is meant and asks git for a hash: keep the output for the result."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as sink, redirect_stdout(sink), _errors_to(sink):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _errors_to(sink):
    """Stderr of this process and its children goes to `sink`, unless someone watches the progress there."""
    if sys.stderr.isatty():
        yield
        return
    kept = os.dup(2)
    os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
