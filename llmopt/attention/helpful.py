"""Which heads a calibration of attention helps: tried one after the other, by what a text costs with them."""
import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmopt.calibration import head_scores
from llmopt.calibration.losses import row_losses
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks, decoder
from llmopt.runtime.attach import attach, attached, attachment

if TYPE_CHECKING:
    from llmopt.attention.act import Act

LOG = logging.getLogger(__name__)
Place = tuple[int, int]         # layer, head
Row = dict[str, Tensor]


def helpful(act: "Act", model: nn.Module, run: Run) -> dict[str, Any]:
    """The meta of the method's record. Heads are tried in order, each beside those that have been kept so far.

    A head is kept if the mean loss of the rows falls by more than `sure` standard errors. The paper tries every head by
    itself, by its accuracy on tasks.
    """
    if act.needs_data and not run.batches:
        raise LlmoptError("which heads to calibrate is tried on calibration data, and there is none")
    rows = _rows(run, act.rows, model.device) if act.needs_data else []
    tried, layers = _candidates(act, model, run, rows), len(blocks(model))
    if not act.filter:
        return _by_layer(tried, layers) | {"tried": len(tried)}
    kept: list[Place] = []
    first = best = _remembered(act, model, run, rows, kept)
    for place in run.progress(tried, f"{act.name}: heads"):
        now = _remembered(act, model, run, rows, [*kept, place])
        gain = best - now
        if float(gain.mean()) > act.sure * float(gain.std()) / math.sqrt(len(gain)):
            kept, best = [*kept, place], now
    if not kept:
        LOG.warning("%s: none of the %d heads tried makes the text more likely; the model stays as it is", act.name,
                    len(tried))
    return _by_layer(kept, layers) | {"tried": len(tried), "loss": [float(first.mean()), float(best.mean())]}


def first_rows(run: Run, count: int) -> Sample:
    """The longest of the rows that are read, and one beside it; fewer than two tell nothing."""
    rows = _rows(run, count, torch.device("cpu")) if run.batches else []
    sizes = [row["input_ids"].numel() for row in rows]
    if len(rows) <= 2:
        return Sample(run, 1, "all rows")
    at = min(sizes.index(max(sizes)), len(rows) - 2)
    return Sample(replace(run, batches=rows[at:at + 2]), sum(sizes) / sum(sizes[at:at + 2]), f"2 of {len(rows)} rows")


def _rows(run: Run, count: int, device: torch.device) -> list[Row]:
    """The first rows of the data without their padding, one a batch."""
    rows = [{key: part[i:i + 1, :int(batch["attention_mask"][i].sum())].to(device) for key, part in batch.items()}
            for batch in run.batches for i in range(len(batch["input_ids"]))]
    if len(rows) < 2:
        raise LlmoptError("one row of calibration data tells no standard error; at least 2 are needed")
    return rows[:count]


def _candidates(act: "Act", model: nn.Module, run: Run, rows: list[Row]) -> list[Place]:
    """A `share` of the model's heads, those of the largest scores first; of sinks' masses only heads that have any."""
    views = blocks(model)
    inner = [view for view in views if act.edges <= view.index < len(views) - act.edges]
    if not inner:
        raise LlmoptError(f"edges: {act.edges} layers at each end are left out, and the model has {len(views)}")
    places = [(view.index, head) for view in inner for head in range(view.heads)]
    if act.heads is None:
        scores = _masses(act, model, rows, places)
        places = [(layer, head) for layer, head in places if scores[layer][head] > 0]
    else:
        scores = head_scores.find(act.heads, run, model)
    places.sort(key=lambda place: -float(scores[place[0]][place[1]]))
    return places[:math.ceil(act.share * sum(view.heads for view in views))]


@torch.no_grad()
def _masses(act: "Act", model: nn.Module, rows: list[Row], places: list[Place]) -> list[Tensor]:
    """What each of these heads gives to sinks, summed over the rows: L tensors [H_l]."""
    found = [torch.zeros(view.heads, dtype=torch.float64) for view in blocks(model)]
    with attached(model):
        attach(model, replace(act, beta=1.0), Record(_by_layer(places, len(found))))
        for row in rows:
            decoder(model)(**row, use_cache=False)
        for layer, counter in attachment(model).stats.items():
            found[layer] = counter.mass.cpu()
    return found


def _remembered(act: "Act", model: nn.Module, run: Run, rows: list[Row], places: list[Place]) -> Tensor:
    """The losses below; what a run that was cut off has measured is not measured again."""
    found = run.memory.remember(f"losses with {places}", lambda: {
        "losses": run.ranks.agree(_losses(act, model, rows, places).tolist())})
    return torch.tensor(found["losses"], dtype=torch.float64)


@torch.no_grad()
def _losses(act: "Act", model: nn.Module, rows: list[Row], places: list[Place]) -> Tensor:
    """The mean loss of each row with these heads calibrated, in nats a token: [rows]."""
    with attached(model):
        attach(model, act, Record(_by_layer(places, len(blocks(model)))))
        return torch.cat([row_losses(model, decoder(model)(**row, use_cache=False)[0], row["input_ids"],
                                     row["attention_mask"]).double().cpu() for row in rows])


def _by_layer(places: list[Place], layers: int) -> dict[str, Any]:
    """{"heads": by layer, in order}."""
    return {"heads": [sorted(head for layer, head in places if layer == index) for index in range(layers)]}
