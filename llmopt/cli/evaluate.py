"""`llmopt eval`: one or two models scored with lm-eval."""
import re

import click

from llmopt.cli import completion, log
from llmopt.cli.help import Command
from llmopt.cli.log import LOG
from llmopt.cli.options import ANEW, COUNT, FILE, JSON, MODEL_GROUP, WAYS, check_target, join, model_options
from llmopt.errors import LlmoptError


class BatchSize(click.ParamType):
    """A number, or lm-eval's `auto` and `auto:N`."""

    name = "N|auto"

    def convert(self, value, param, ctx):
        if isinstance(value, int) or str(value).isdecimal() and int(value):
            return int(value)
        if not re.fullmatch(r"auto(:[1-9]\d{0,3})?", str(value)):
            self.fail(f"{value!r} given, a number from 1, auto or auto:N expected", param, ctx)
        return value


def lm_eval_options(command):
    """The options of lm-eval's own command, under its names and with dashes."""
    for option in (
        click.option("--num_fewshot", "--num-fewshot", type=click.IntRange(min=0), help="Examples before a question."),
        click.option("--apply_chat_template", "--apply-chat-template", is_flag=False, flag_value="true", default=None,
                     metavar="[NAME]", help="Ask through the tokenizer's chat template, or the one of this name."),
        click.option("--fewshot_as_multiturn", "--fewshot-as-multiturn", is_flag=False, flag_value="true",
                     type=click.BOOL, metavar="[BOOL]", help="Each example a turn of its own; needs a chat template."),
        click.option("--system_instruction", "--system-instruction", metavar="TEXT", help="What stands before it all."),
        click.option("--gen_kwargs", "--gen-kwargs", multiple=True, metavar="KEY=VALUE,...",
                     help="For tasks that generate: temperature=0.7,do_sample=true."),
        click.option("--seed", default="0", show_default=True, help="One, or Python's, numpy's, torch's, few-shot's."),
        click.option("--include_path", "--include-path", type=FILE, help="A folder of more tasks; they may run code."),
        click.option("--log_samples", "--log-samples", is_flag=True,
                     help="Write every question and answer beside --output, a .jsonl for each task."),
    )[::-1]:
        command = option(command)
    return command


def asking_of(num_fewshot, apply_chat_template, fewshot_as_multiturn, system_instruction, gen_kwargs, seed,
              include_path, log_samples):
    """The Asking of these options; raises LlmoptError for a wrong value, and for one that nothing would come of."""
    from llmopt_evals.asking import Asking, generation, seeds

    if fewshot_as_multiturn and apply_chat_template in (None, "false"):
        raise LlmoptError("--fewshot_as_multiturn: turns are those of a chat template; give --apply_chat_template too")
    template = {None: False, "false": False, "true": True}.get(apply_chat_template, apply_chat_template)
    return Asking(num_fewshot, template, fewshot_as_multiturn is not False, system_instruction, generation(gen_kwargs),
                  seeds(seed), str(include_path) if include_path else None, log_samples)


LM_EVAL = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs", "seed",
           "include_path", "log_samples")
GROUPS = {"What is asked": ("tasks", "compare", "limit", "text", "data", "batch_size", "anew"),
          "How it is asked, as by lm-eval's own command": LM_EVAL, "Model": MODEL_GROUP,
          "Output": ("output", "as_json")}
EXAMPLES = ("llmopt eval llmopt/reference --tasks world_ppl,world_copy --limit 20",
            "llmopt eval out --tasks world_recall --limit 2 --compare llmopt/reference",
            "llmopt eval out --tasks world_copy --limit 2 --num_fewshot 1 --output r.json --log_samples")


@click.command("eval", cls=Command, groups=GROUPS, examples=EXAMPLES)
@log.verbosity
@click.argument("model", shell_complete=completion.models)
@click.option("--tasks", required=True, help="Task names, separated by commas; every name lm-eval knows.",
              shell_complete=completion.tasks)
@click.option("--compare", help="A second model, scored beside the first.", shell_complete=completion.models)
@click.option("--limit", type=COUNT, help="Only the first N documents of each task.")
@click.option("--batch-size", "--batch_size", type=BatchSize(), default=16, show_default=True)
@click.option("--text", help="The file that the task text_ppl reads.")
@click.option("--data", help="What fidelity compares on: a file, a source's name, a dataset; default: the "
                             "calibration's.")
@click.option("--output", type=FILE, help="Also write lm-eval's results to this JSON file.")
@lm_eval_options
@ANEW
@model_options
@JSON
def evaluate(model, tasks, compare, limit, batch_size, text, data, output, anew, as_json, **loading) -> None:
    """Score a model with lm-eval, its cache methods really in force."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals import evaluate as scores
    from llmopt_evals import kept as dense
    from llmopt_evals import pairs
    from llmopt_evals.asking import write_samples
    from llmopt_evals.preflight import check_tasks

    from llmopt.model.loading import check_device
    from llmopt.specs import EvalSpec, ModelSpec

    asking = asking_of(**{name: loading.pop(name) for name in LM_EVAL})
    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if not chosen:
        raise LlmoptError("--tasks names no task")
    if asking.log_samples and output is None:
        raise LlmoptError("--log_samples needs --output FILE, beside which they are written")
    check_target(output)
    models = [ModelSpec(id=model, **loading)]
    if compare is not None:
        models.append(ModelSpec(id=compare, **loading | {"revision": None, **WAYS}))
    check_device(loading["device"])
    pair = pairs.asked_for(chosen, models, data)     # as this: before the first is scored
    tasks = [task for task in chosen if task != pairs.NAME]
    check_tasks(models, tasks, text, asking)
    columns, kept, team = {}, {}, join(loading["device"])
    rows_at_once = batch_size if isinstance(batch_size, int) else EvalSpec().batch_size
    compared = pairs.by_name(pair, EvalSpec(limit=limit, batch_size=rows_at_once), team)
    for spec in models:
        results = None
        if tasks:
            LOG.info("scoring %s", spec.id)
            results, kept[spec.id] = dense.scores(spec, tasks, limit, batch_size, text, team, anew, asking)
        results = pairs.joined(results, compared.pop(spec.id, None))
        if not team.is_main or not results:          # none: a model beside itself
            continue
        columns[spec.id] = scores.column(results)
        if output and spec is models[0]:
            scores.write_results(results, output, model, asking)
            write_samples(results, output)
    columns |= {name: scores.column(results) for name, results in compared.items()}
    tables.show_scores(columns, as_json, kept)
