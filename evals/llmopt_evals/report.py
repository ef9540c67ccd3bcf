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
from llmopt.specs import EvalSpec, ModelSpec
from llmopt_evals import evaluate as scores
from llmopt_evals import kept


def known(output: Path, ranks: Ranks = Ranks()) -> dict[str, Any]:       # noqa: B008  frozen
    """A finished checkpoint's facts, with the table of what is known so far; folder and card hold them from here on."""
    facts = ranks.agree(read_facts(output))
    check_shape(facts, RUN, str(output / FILE))
    _keep(output, facts, ranks)
    return facts


def scored(output: Path, dense: ModelSpec, wanted: EvalSpec, ranks: Ranks, anew: bool = False) -> dict[str, Any]:
    """A finished checkpoint's facts, with the scores of the dense and the compressed model where those are missing.

    anew: what is kept of the dense model is measured again. The dates of what was kept, under "kept", are told and not
    written: a run repeated writes the same bytes.
    """
    facts = known(output, ranks)
    if not wanted.tasks or "scores" in facts:
        return facts
    found, told = {}, {}
    after = ModelSpec(id=str(output), device=dense.device, compute_dtype=dense.compute_dtype,
                      trust_remote_code=dense.trust_remote_code)
    for which, model in (("before", dense), ("after", after)):
        LOG.info(f"scoring the model {which} compression")
        results, dates = kept.scores(model, wanted.tasks, wanted.limit, wanted.batch_size, wanted.text, ranks, anew)
        if ranks.is_main:
            scores.write_results(results, output / f"eval-{which}.json", "." if model is after else model.id)
            found[which] = [list(row) for row in scores.figures(results)]
            told |= {which: dates} if dates else {}
    facts = facts | {"scores": found}
    _keep(output, facts, ranks)
    return facts | ({"kept": told} if told else {})


def _keep(output: Path, facts: dict[str, Any], ranks: Ranks) -> None:
    """Put the table into `facts`, llmopt.json and the card."""
    facts["table"] = table(facts)
    text = json.dumps(facts, indent=2) + "\n"
    if ranks.is_main and (output / FILE).read_text(encoding="utf-8") != text:
        write_text(output / FILE, text)
        write_card(output)
