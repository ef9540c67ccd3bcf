"""The figures at the end of a run: sizes, cache and scores, before and after, kept in the checkpoint's llmopt.json."""
import json
from pathlib import Path
from typing import Any

from llmopt.checkpoint.card import write_card
from llmopt.checkpoint.facts import FILE, RUN, read_facts
from llmopt.cli.log import LOG
from llmopt.cli.tables import human
from llmopt.files.json_shapes import check_shape
from llmopt.files.shards import write_text
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


def table(facts: dict[str, Any]) -> list[list[str]]:
    """Rows [what, before, after]."""
    (many, left), (full, kept) = facts["parameters"], facts["cache_bytes_per_token"]
    predicted = facts["predicted_bytes"]
    rows = [["file size", human(facts["dense_bytes"]), human(facts["bytes"])],
            ["predicted file size", "", human(predicted) if predicted else "not predicted"],
            ["parameters", f"{many:,}", f"{left:,}"],
            ["bits per parameter of the file", f"{8 * facts['dense_bytes'] / many:.2f}",
             f"{8 * facts['bytes'] / left:.2f}"],
            ["bits per quantized weight", f"{_dense_bits(facts):.0f}", _quantized_bits(facts)],
            ["cache bytes per token", f"{full:,.0f}", f"{kept:,.0f}"]]
    after = {(task, metric): value for task, metric, value in facts.get("scores", {}).get("after", [])}
    for task, metric, value in facts.get("scores", {}).get("before", []):
        rows.append([f"{task} {metric}", f"{value:.4f}", f"{after.get((task, metric), float('nan')):.4f}"])
    return rows


def _dense_bits(facts: dict[str, Any]) -> float:
    return round(8 * facts["dense_bytes"] / facts["parameters"][0] / 8) * 8


def _quantized_bits(facts: dict[str, Any]) -> str:
    metas = [r["meta"] for r in facts["records"] if r["method"].startswith("quant.")]
    return f"{metas[-1]['bits']:.3f}" if metas else "-"
