"""The evaluation at the end of a run, looked at before the run: hours of work should not end in a missing file."""
from pathlib import Path
from typing import Any

from llmopt.model.loading import load_tokenizer, read_config, resolve
from llmopt.specs import EvalSpec, ModelSpec
from llmopt_evals.asking import Asking, check_asking, check_templates
from llmopt_evals.evaluate import FOR_ANY, asked_by, check_names, foreign_tasks, prepared, refuse_foreign
from llmopt_evals.fidelity import NAME


def check_tasks(models: list[ModelSpec], tasks: list[str], text: str | None,
                asking: Asking = Asking()) -> None:      # noqa: B008  frozen
    """Raise LlmoptError unless each model is there and can be asked each task; no weight is read."""
    configs = [read_config(spec)[1] for spec in models]
    check_asking(asking, models[0].trust_remote_code)
    if not tasks:
        return
    check_names(tasks, models[0].trust_remote_code, asking.include_path)
    for spec, config in zip(models, configs, strict=True):
        tokenizer = tokenizer_of(spec)
        refuse_foreign(tasks, tokenizer)
        if tokenizer is not None:
            check_templates(asking, tokenizer, spec.id)
        prepared(tasks, spec.trust_remote_code, asked_by(config, tokenizer, text), asking.include_path)


def agreed_tasks(spec: ModelSpec, wanted: EvalSpec, output: Path, named: bool = False) -> tuple[list[str], list[str]]:
    """(tasks that the run will end in, what to say about those that it will not).

    In place of tasks of the embedded world a model of another vocabulary gets `fidelity`, so that a packaged recipe
    runs on any model; where the user has named the tasks, they are an error. output: the checkpoint to be scored later.
    Raises LlmoptError for an unknown task, and one whose data or text cannot be had.
    """
    tasks, ours = [task for task in wanted.tasks if task != NAME], [NAME] if NAME in wanted.tasks else []
    if not tasks:
        return ours, []
    _, config = read_config(spec)
    check_names(tasks, spec.trust_remote_code)
    tokenizer = tokenizer_of(spec)
    if tokenizer is None:
        return [NAME], [f"not scored: {', '.join(tasks)}, as {spec.id} has no tokenizer; instead: {NAME}"]
    if named:
        refuse_foreign(tasks, tokenizer)
    foreign = foreign_tasks(tasks, tokenizer)
    notes = [f"not scored: {', '.join(foreign)}, written in the vocabulary of llmopt/reference; this model has another"
             f". Instead: {NAME}. More, later: {later(spec, output, FOR_ANY.split(','))} --text FILE"]
    left = [task for task in tasks if task not in foreign]
    prepared(left, spec.trust_remote_code, asked_by(config, tokenizer, wanted.text))
    return ([*left, NAME], notes) if foreign else ([*left, *ours], [])


def later(model: ModelSpec, output: Path, tasks: list[str]) -> str:
    """The command that scores a finished checkpoint beside the model it was made of."""
    return f"llmopt eval {output} --tasks {','.join(tasks)} --compare {model.id}"


def tokenizer_of(spec: ModelSpec) -> Any:
    """The tokenizer beside a model, or None."""
    return load_tokenizer(resolve(spec), spec.revision, spec.trust_remote_code)
