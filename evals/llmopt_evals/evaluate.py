"""Scores from lm-eval: the tasks of the embedded world without its 14,000-name index, every other task by name."""
import json
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from llmopt.errors import LlmoptError, nearest
from llmopt.files.json_shapes import finite
from llmopt.files.shards import write_text
from llmopt.model.computing import computing
from llmopt.scale.processes import Ranks
from llmopt.specs import ModelSpec
from llmopt_evals.asking import Asking, check_asking, check_templates
from llmopt_evals.large import opened
from llmopt_evals.task_names import task_names
from llmopt_evals.texts import documents
from llmopt_evals.world import speaks_world, tasks_path

READER = "reader"                        # key of the metadata: a function that returns (tokenizer, longest input)
FOR_ANY = "text_ppl,needles"             # what to score a model with that does not know the world
DRAWS = 1000                             # for standard errors that have no formula, such as that of F1
NO_FORKS = "DISABLE_MULTIPROC"          # lm-eval's variable
PASSING = ("samples", "date", "git_hash", "upper_git_hash", "pretty_env_info")     # of lm-eval's results: not written


def evaluate(model: ModelSpec | nn.Module, tasks: list[str], tokenizer: Any = None, limit: int | None = None,
             batch_size: int = 16, text: str | None = None,
             ranks: Ranks = Ranks(), options: dict[str, Any] | None = None,      # noqa: B008  both are frozen
             asking: Asking = Asking(), trust: bool = False) -> dict[str, Any] | None:                # noqa: B008
    """lm-eval's results for a model to be loaded, or a loaded one with its tokenizer.

    text: the file of the tasks `text_ppl` and `needles`. ranks: the processes that divide the requests; rank 0 gets the
    results, the others None. options: what lm-eval calls metadata, such as the lengths of `needles`. asking: few-shot
    examples, chat template and the like. trust: code of task files may run, as where a model to be loaded says so.
    Raises LlmoptError for an unknown task, a task whose data cannot be had or whose words the model does not know, and
    a model that cannot be loaded.
    """
    from lm_eval import simple_evaluate

    from llmopt_evals.lm import LlmoptLM

    trust, options = trust or isinstance(model, ModelSpec) and model.trust_remote_code, dict(options or {})
    check_asking(asking, trust)
    check_names(tasks, trust, asking.include_path)            # a wrong name is an error before the model is loaded
    there = opened(model) if isinstance(model, ModelSpec) else nullcontext((model, tokenizer))
    with there as (loaded, words):
        refuse_foreign(tasks, words)
        check_templates(asking, words, loaded.config.name_or_path)
        manager = prepared(tasks, trust, options | asked_by(loaded.config, words, text), asking.include_path)
        with _quiet(), _unsurveyed(), _in_this_process(), _naming(tasks), computing(loaded):
            lm = LlmoptLM(pretrained=loaded, tokenizer=words, batch_size=batch_size, ranks=ranks)
            return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=DRAWS,
                                   **asking.arguments())


@contextmanager
def _in_this_process():
    """Standard errors by drawing again are computed here: lm-eval would fork, with the model and all its threads."""
    before = os.environ.get(NO_FORKS)
    os.environ[NO_FORKS] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_FORKS)
        os.environ |= {} if before is None else {NO_FORKS: before}


@contextmanager
def _unsurveyed():
    """After each run lm-eval asks pip and the machine for seconds what they are, of which nothing is kept."""
    from lm_eval import evaluator

    survey, evaluator.add_env_info = evaluator.add_env_info, lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = survey


def prepared(tasks: list[str], trust: bool, metadata: dict[str, Any], folder: str | None = None) -> Any:
    """A manager whose tasks have all been built once: their data are on this machine, their files can be read."""
    manager = task_manager(tasks, trust, metadata, folder)
    if "text" in metadata:
        documents(metadata["text"])                 # asked for by no task, perhaps, and still meant
    with _quiet(), _naming(tasks):
        manager.load(tasks)
    return manager


def versions(manager: Any, tasks: list[str]) -> dict[str, Any]:
    """{name: version} of the tasks, and of those below a group."""
    with _quiet():
        return {name: task.VERSION for name, task in manager.load(tasks)["tasks"].items()}


def asked_by(config: Any, tokenizer: Any, text: str | None) -> dict[str, Any]:
    """The metadata from which tasks are made for one model: its reader, and the file that was given."""
    limit = config.get_text_config().max_position_embeddings
    return {READER: lambda: (tokenizer, limit)} | ({"text": text} if text is not None else {})


@contextmanager
def _naming(tasks: list[str]):
    """Name the tasks in an error of lm-eval's: no network, no such dataset, a package that is missing."""
    try:
        yield
    except LlmoptError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        fact = (str(error) or type(error).__name__).splitlines()[0]
        raise LlmoptError(f"the tasks {', '.join(tasks)} cannot be run: {fact}") from error


def refuse_foreign(tasks: list[str], tokenizer: Any) -> None:
    """Raise LlmoptError for tasks that are written in words which this tokenizer does not have."""
    if foreign := foreign_tasks(tasks, tokenizer):
        raise LlmoptError(f"{', '.join(foreign)}: written in the vocabulary of llmopt/reference, and this model has "
                          f"another. For any model: --tasks {FOR_ANY} --text FILE")


def foreign_tasks(tasks: list[str], tokenizer: Any) -> list[str]:
    """The tasks that are written in the embedded world's words, where `tokenizer` has other ones."""
    return [] if speaks_world(tokenizer) else [task for task in tasks if task.startswith("world")]


def check_names(tasks: list[str], trust: bool = False, folder: str | None = None) -> None:
    """Raise LlmoptError for a task that nobody knows; lm-eval's index is read only for names that were not shipped."""
    if folder or not set(tasks) <= set(task_names()):
        task_manager(tasks, trust, folder=folder)


def task_manager(tasks: list[str], trust: bool = False, metadata: dict[str, Any] | None = None,
                 folder: str | None = None) -> Any:
    """A manager that knows `tasks`; lm-eval's own index (12 to 20 s) is read only if one of them is not ours.

    trust: a task may also be a YAML file, whose `!function`, `include` and templates can run any code.
    metadata: what tasks are made from. folder: of more tasks, whose groups may name any of lm-eval's.
    """
    from lm_eval.tasks import TaskManager

    files = task_files(tasks)
    places = [str(tasks_path()), *([folder] if folder else [])]
    if files and not trust:
        raise LlmoptError(f"{min(files)}: a task of a file can run code of its own; read it, and if you trust it give "
                          "--trust-remote-code on the command line")
    with _quiet():
        ours = TaskManager(include_path=places, include_defaults=False, metadata=metadata)
        if set(tasks) <= {*(ours.all_subtasks if folder else ours.all_tasks), *files}:
            return ours
        for task in tasks:
            if task.startswith("world") and task not in (*ours.all_tasks, *files):
                raise LlmoptError(f"there is no task {task!r}{nearest(task, ours.all_tasks)}")
        manager = TaskManager(include_path=places, metadata=metadata)
    for task in tasks:
        if task not in (*manager.all_tasks, *files):           # no pattern: lm-eval would open a file of that name
            hint = nearest(task, manager.all_tasks).split(". Choices")[0]       # 14,000 names are no choice
            raise LlmoptError(f"there is no task {task!r}{hint}")
    return manager


def task_files(tasks: list[str]) -> set[str]:
    """Those of the tasks that are YAML files."""
    return {task for task in tasks if Path(task).suffix in (".yaml", ".yml") and Path(task).expanduser().is_file()}


def figures(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) rows, groups first, in lm-eval's order; standard errors left out."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric = key.split(",")[0]
            if "," in key and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                rows.append((task, metric, float(value)))
    return rows


def errors(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, standard error) of the figures that have one."""
    return [(task, key.split(",")[0].removesuffix("_stderr"), float(value))
            for task, values in results["results"].items() for key, value in values.items()
            if key.split(",")[0].endswith("_stderr") and finite(value)]


def column(results: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """{(task, metric): (value, standard error)}, as tables show them."""
    found = {(task, metric): error for task, metric, error in errors(results)}
    return {(task, metric): (value, found.get((task, metric))) for task, metric, value in figures(results)}


def write_results(results: dict[str, Any], path: Path, model: str, asking: Asking = Asking()) -> None:    # noqa: B008
    """The results of `model` as JSON, without what differs from run to run."""
    kept = {k: v for k, v in results.items() if k not in PASSING}
    kept["config"] = kept["config"] | {"model": model} | asking.changed()
    for config in kept.get("configs", {}).values():
        config.get("metadata", {}).pop(READER, None)
    write_text(path, json.dumps(kept, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable  # seconds, which results without such values save

    return handle_non_serializable(value)


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
    """Stderr of this process and its children goes to `sink`; on a terminal the progress bars still arrive."""
    watched = sys.stderr.isatty()
    with os.fdopen(os.dup(2), "w") as kept, redirect_stderr(kept if watched else sink):
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)
