"""How far a compressed model is from the dense one that it was made of, for any model and any rows of tokens.

    kl          mean over positions of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats a token; p dense, q not
    agreement   share of positions where both have the same first choice
    perplexity  exp of the mean negative log-likelihood of the tokens that really follow, of either model

and `loglikelihood_change`, the mean log-likelihood of the compressed model minus that of the dense one. Of every row
the second half is scored, its first half having been the prompt (continuation.py): what the methods of a cache do is
seen, and figures with and without them are about the same positions. Both models are read in the same way.

Standard errors are those over rows: tokens of one row are correlated and count as one draw. With s_r the sum over the
n_r positions of row r, N = sum n_r and m = sum s_r / N, the error of m is sqrt(R / (R - 1) sum (s_r - m n_r)^2) / N; of
the perplexity it is that of the log-likelihood times the perplexity, of the change that of the differences by row.
Rows that were cut from one document may be alike, which no error here knows of.

Models that compute in bfloat16 differ by its rounding too: SmolLM2 in bfloat16 is 0.0011 nats away from itself in
float32, and its 8-bit version 0.0037 from it, both in bfloat16; `compute_dtype: float32` leaves the rounding out. The
dense model's float16 file adds less than 1e-5.
"""
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmopt.calibration.data import Batch
from llmopt.errors import LlmoptError
from llmopt.model.architectures import SPECS
from llmopt.model.computing import computing
from llmopt.model.loaded import evaluating
from llmopt.scale.processes import Ranks
from llmopt_evals.batching import batch_tokens, cache_bytes
from llmopt_evals.continuation import SHORTEST, scored, states, targets, unseen
from llmopt_evals.distributions import LEAST, TYPE, Distributions, room
from llmopt_evals.readout import Readout

LOG = logging.getLogger("llmopt")
NAME = "fidelity"                       # wherever a task's name is expected
ROWS, LENGTH = 16, 512
BYTES = 1 << 30                         # of the dense model's distributions: fewer positions of a large vocabulary
BATCH = 16                              # rows read together at most
Opened = AbstractContextManager[tuple[nn.Module, Any]]                  # a model and its tokenizer, for as long as used
Draw = Callable[[nn.Module, Any], list[Batch]]                          # rows of tokens for that model
Figures = dict[str, tuple[float, float | None]]                         # {metric: (value, standard error)}


class Row(NamedTuple):
    """One row at its n scored positions, float64 [n] each; before, after: log-likelihoods of the dense model's and the
    compressed model's.
    """

    kl: Tensor
    agrees: Tensor
    before: Tensor
    after: Tensor


Against = Callable[[Opened], list[Row]]                 # holds a model against the dense one


class Expected(NamedTuple):
    """What the dense model says of one row besides its distributions: log-likelihoods and first choices, [n]."""

    logp: Tensor
    choice: Tensor


class Sample(NamedTuple):
    """The rows of one process, longest first, their numbers among all, and how many positions of each are scored."""

    rows: list[Tensor]
    numbers: list[int]
    most: int
    batch_size: int

    def positions(self, index: int) -> Tensor:
        """Which predictions of a row are scored: all, or `most` of them at even distances."""
        count = scored(len(self.rows[index]))
        return torch.linspace(0, count - 1, min(count, self.most)).round().long()


def compare(dense: Opened, compressed: Opened, draw: Draw, place: Path, ranks: Ranks = Ranks(),     # noqa: B008  frozen
            batch_size: int = BATCH) -> list[Row]:
    """Every row as both models see it, one model in memory after the other; processes divide the rows.

    place: a folder for the dense model's distributions, which are gone afterwards however this ends.
    Raises LlmoptError for rows too short, another vocabulary, a disk too full, and a model that computes NaN.
    """
    with reference(dense, draw, place, ranks, batch_size) as against:
        return against(compressed)


@contextmanager
def reference(dense: Opened, draw: Draw, place: Path, ranks: Ranks = Ranks(),       # noqa: B008  frozen
              batch_size: int = BATCH) -> Iterator[Against]:
    """Inside, what holds one model after the other against the dense one, which was asked once; see `compare`."""
    with ExitStack() as stack:
        sample, kept, expected = _dense(dense, draw, place, ranks, batch_size, stack)
        gc.collect()                                    # both models at once may be more than the memory holds
        yield partial(_against, sample, kept, expected, ranks)


@torch.no_grad()
def _against(sample: Sample, kept: Distributions, expected: list[Expected], ranks: Ranks,
             compressed: Opened) -> list[Row]:
    """Every row, in order, as the compressed model sees it beside what the dense one has left."""
    kept.rewind()
    with compressed as (model, _), evaluating(model), computing(model):
        own = _held_against(model, sample, kept, expected)
    parts = ranks.gather(list(zip(sample.numbers, own, strict=True)))
    return [row for _, row in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


@torch.no_grad()
def _dense(dense: Opened, draw: Draw, place: Path, ranks: Ranks, batch_size: int,
           stack: ExitStack) -> tuple[Sample, Distributions, list[Expected]]:
    """(this process' rows, their distributions, all else that the dense model says of them)."""
    with dense as (model, words), evaluating(model), computing(model):
        readout = Readout(model)
        drawn = ranks.agree(draw(model, words) if ranks.is_main else None)
        sample = _sample(drawn, readout.vocabulary(), ranks, batch_size)
        count = sum(len(sample.positions(index)) for index in range(len(sample.rows)))
        kept = stack.enter_context(room(place, count, readout.vocabulary()))
        found: list[list[Expected]] = [[] for _ in sample.rows]
        for index, table, wanted in _tables(readout, sample, "the dense model"):
            kept.write(table)
            found[index].append(Expected(_likelihoods(table, wanted), table.argmax(-1).cpu()))
    return sample, kept, [Expected(*map(torch.cat, zip(*pieces, strict=True))) for pieces in found]


def _sample(batches: list[Batch], vocabulary: int, ranks: Ranks, batch_size: int) -> Sample:
    """This process' share of the rows, without padding; raises LlmoptError if none is long enough."""
    rows = [ids[mask.bool()] for batch in batches for ids, mask in zip(*_columns(batch), strict=True)]
    long = [(number, ids) for number, ids in enumerate(rows) if len(ids) >= SHORTEST]
    if not long:
        raise LlmoptError(f"{NAME}: rows of at least {SHORTEST} tokens are needed, the longest of {len(rows)} has "
                          f"{max(map(len, rows), default=0)}; give longer texts")
    own = sorted(ranks.share(long), key=lambda pair: -len(pair[1]))
    most = max(1, BYTES // (len(long) * vocabulary * TYPE.itemsize))
    return Sample([ids for _, ids in own], [number for number, _ in own], most, batch_size)


def _columns(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def _held_against(model: nn.Module, sample: Sample, kept: Distributions, expected: list[Expected]) -> list[Row]:
    """The rows as the compressed model sees them beside what the dense one has left."""
    readout = Readout(model)
    if readout.vocabulary() != kept.vocabulary:
        raise LlmoptError(f"{NAME}: the compressed model has a vocabulary of {readout.vocabulary():,} tokens, the "
                          f"dense one of {kept.vocabulary:,}; their predictions cannot be compared")
    if note := unseen(model, max(map(len, sample.rows), default=0)):
        LOG.info(note)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in sample.rows]
    for index, table, wanted in _tables(readout, sample, "the compressed model"):
        dense = kept.read(len(table)).to(table.device)
        kl = (dense.exp() * (dense - table.clamp(min=LEAST))).sum(-1).clamp(min=0)
        found[index].append((kl.double().cpu(), table.argmax(-1).cpu(), _likelihoods(table, wanted)))
    rows = [map(torch.cat, zip(*pieces, strict=True)) for pieces in found]
    return [Row(kl, (choice == told.choice).double(), told.logp, logp)
            for (kl, choice, logp), told in zip(rows, expected, strict=True)]


def _tables(readout: Readout, sample: Sample, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(a row's index, log-probabilities [n, vocabulary] at its next positions, the tokens [n] that follow them)."""
    for batch in _batches(readout.model, sample):
        ids = torch.stack([sample.rows[index] for index in batch]).to(readout.model.device)
        for index, row, wanted in zip(batch, states(readout, ids), targets(ids), strict=True):
            where = sample.positions(index).to(ids.device)
            pieces = zip(where.split(readout.rows()), readout.tables(row[where]), strict=True)
            for positions, table in pieces:
                _check(table, positions, f"{name}: row {sample.numbers[index]}", len(ids[0]) // 2)
                yield index, table, wanted[positions]


def _batches(model: nn.Module, sample: Sample) -> Iterator[list[int]]:
    """Rows of one length, in order, as many as the memory holds: nothing is padded."""
    lengths = [len(ids) for ids in sample.rows]
    kept = cache_bytes(model) if model.config.get_text_config().model_type in SPECS else 0
    tokens = batch_tokens(model, max(lengths, default=0), kept)
    for length, alike in groupby(range(len(lengths)), key=lengths.__getitem__):
        indices, size = list(alike), max(1, min(sample.batch_size, tokens // length))
        yield from (indices[start:start + size] for start in range(0, len(indices), size))


def _check(table: Tensor, positions: Tensor, where: str, prompt: int) -> None:
    """Raise LlmoptError for the first position at which a model's predictions are no numbers."""
    damaged = table[:, 0].isnan()                       # one NaN among the logits, or an infinity: all are NaN
    if bool(damaged.any()):
        first = int(positions[damaged.nonzero()[0, 0]]) + prompt
        raise LlmoptError(f"{where}, position {first}: computes NaN; its weights, or its methods', are damaged")


def _likelihoods(table: Tensor, wanted: Tensor) -> Tensor:
    return table.gather(1, wanted[:, None])[:, 0].double().cpu()


def figures(rows: list[Row]) -> tuple[Figures, Figures]:
    """({metric: (value, standard error)} of the dense model, of the compressed one)."""
    kl, agrees, before, after = (list(column) for column in zip(*rows, strict=True))
    every = torch.cat(kl)
    change = [late - early for early, late in zip(before, after, strict=True)]
    return {"perplexity": perplexity(before)}, {
        "kl": over_rows(kl), "kl_p99": (float(every.quantile(0.99)), None), "kl_max": (float(every.max()), None),
        "agreement": over_rows(agrees), "perplexity": perplexity(after), "loglikelihood_change": over_rows(change)}


def over_rows(values: list[Tensor]) -> tuple[float, float | None]:
    """(mean over all positions, its standard error with rows as the draws); one row alone has no error."""
    sums, counts = (torch.tensor([float(value) for value in column], dtype=torch.float64)
                    for column in ([row.sum() for row in values], [len(row) for row in values]))
    mean, number = sums.sum() / counts.sum(), len(values)
    if number < 2:
        return float(mean), None
    spread = (sums - mean * counts).square().sum() * number / (number - 1)
    return float(mean), float(spread.sqrt() / counts.sum())


def perplexity(logp: list[Tensor]) -> tuple[float, float | None]:
    """(exp of the mean negative log-likelihood, its standard error to first order)."""
    mean, error = over_rows(logp)
    value = float(torch.tensor(-mean, dtype=torch.float64).exp())
    return value, None if error is None else value * error
