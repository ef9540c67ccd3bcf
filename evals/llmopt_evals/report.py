"""The figures at the end of a run: sizes, cache and scores, before and after, kept in the checkpoint's llmopt.json."""
import json
from pathlib import Path
from typing import Any

from llmopt.checkpoint.card import write_card
from llmopt.checkpoint.facts import FILE, RUN, read_facts
from llmopt.cli.log import LOG
from llmopt.files.json_shapes import check_shape
from llmopt.files.shards import write_text
from llmopt.run.table import table
from llmopt.scale.processes import Ranks
from llmopt.specs import DataSpec, EvalSpec, ModelSpec
from llmopt_evals import evaluate as scores
from llmopt_evals import kept, pairs
from llmopt_evals.fidelity import NAME


def known(output: Path, ranks: Ranks = Ranks()) -> dict[str, Any]:       # noqa: B008  frozen
    """A finished checkpoint's facts, with the table of what is known so far; folder and card hold them from here on."""
    facts = ranks.agree(read_facts(output))
    check_shape(facts, RUN, str(output / FILE))
    _keep(output, facts, ranks)
    return facts


def scored(output: Path, source: tuple[ModelSpec, DataSpec], wanted: EvalSpec, ranks: Ranks,
           anew: bool = False) -> dict[str, Any]:
    """A finished checkpoint's facts, with the scores of the dense and the compressed model where those are missing.

    source: the dense model, and the data whose rows `fidelity` compares the two on. anew: what is kept of the dense
    model is measured again. The dates of what was kept, under "kept", are told and not
    written: a run repeated writes the same bytes.
    """
    facts = known(output, ranks)
    if not wanted.tasks or "scores" in facts:
        return facts
    found, told, (dense, data) = {"scores": {}, "errors": {}}, {}, source
    after = ModelSpec(id=str(output), device=dense.device, compute_dtype=dense.compute_dtype,
                      trust_remote_code=dense.trust_remote_code)
    beside = _compared(dense, after, data, wanted, ranks)
    for which, model in (("before", dense), ("after", after)):
        results, dates = _of_tasks(which, model, wanted, ranks, anew)
        if ranks.is_main:
            results = pairs.joined(results, beside.get(which))
            scores.write_results(results, output / f"eval-{which}.json", "." if model is after else model.id)
            found["scores"][which] = [list(row) for row in scores.figures(results)]
            found["errors"][which] = [list(row) for row in scores.errors(results)]
            told |= {which: dates} if dates else {}
    facts = facts | found
    _keep(output, facts, ranks)
    return facts | ({"kept": told} if told else {})


def _compared(dense: ModelSpec, after: ModelSpec, data: DataSpec, wanted: EvalSpec, ranks: Ranks) -> dict[str, dict]:
    """{"before": results, "after": results} of `fidelity`, if it is wanted."""
    if NAME not in wanted.tasks:
        return {}
    LOG.info("comparing the compressed model with the dense one")
    return dict(zip(("before", "after"), pairs.results(dense, after, data, wanted, ranks), strict=True))


def _of_tasks(which: str, model: ModelSpec, wanted: EvalSpec, ranks: Ranks,
              anew: bool) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """(results of lm-eval's tasks, {task: date} of those that were kept)."""
    if not (tasks := [task for task in wanted.tasks if task != NAME]):
        return None, {}
    LOG.info(f"scoring the model {which} compression")
    return kept.scores(model, tasks, wanted.limit, wanted.batch_size, wanted.text, ranks, anew)


def _keep(output: Path, facts: dict[str, Any], ranks: Ranks) -> None:
    """Put the table into `facts`, llmopt.json and the card."""
    facts["table"] = table(facts)
    text = json.dumps(facts, indent=2) + "\n"
    if not ranks.is_main:
        return
    for leftover in output.glob(".*.partial-*"):            # of a run that was killed here
        leftover.unlink()
    if (output / FILE).read_text(encoding="utf-8") != text:
        write_card(output, facts)                           # first: without its new facts the folder is not done
        write_text(output / FILE, text)
