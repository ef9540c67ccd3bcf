"""ACT: tokens that draw attention and are not worth it draw less, in heads where a text is then predicted better.

    S(t)      = { k : a_k(t) > threshold  and  a_k(t) > times * e_k(t)  and  t - k + 1 >= queries  and  k > 0 }
    a_k(t)    = mean of A[u, k] over the tokens u = k .. t;  e_k(t): that mean if every token attended evenly
    A'[t, k]  = beta A[t, k]                                          k in S(t)
    A'[t, j]  = A[t, j] (1 + (1 - beta) m / (1 - m))                  j not in S(t), m = sum of A[t, k] over S(t)

Rows go on adding up to 1. `times` and `queries` are the guard, ours: without it, what tokens say of themselves and of
their neighbours counts as a sink, in models that have none. The first real token is never one, whatever it draws.

ACT (Yu et al., 2024, arXiv:2406.15765). There S comes from the whole map of a prompt, and decoded tokens are left as
they are. Here it comes from what has been read so far: a text that is read in pieces, token by token, or beside a
padded one is adjusted alike, and none of it looks ahead. Which heads: helpful.py. Left out: how evenly a column is
drawn on, as a further sign of a sink.
"""
import dataclasses
from typing import ClassVar

import torch
from llmopt_kernels.reference import softmax
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.attention.helpful import first_rows, helpful
from llmopt.calibration.head_scores import check_chosen
from llmopt.method import Record, Run, Sample
from llmopt.parts import register
from llmopt.runtime.attach import AdjustMethod
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.prompt import Attended

ENTRIES = 2**21         # of a tile of an attention map: 8 MiB of fp32


@dataclasses.dataclass
class Drawn:
    """What sinks drew in one layer: mass [H], summed over the queries of all texts; queries: their number."""

    mass: Tensor
    queries: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a batch row: bool [seen] which are real, [seen] how many real ones stand in front of each.

    even: [seen + 1], what the first token draws from the first n queries together if all attend evenly.
    """

    real: Tensor
    place: Tensor
    even: Tensor

    @classmethod
    def of(cls, at: Attended, row: int) -> "Text":
        device, reach = at.query.device, at.rule.window or at.seen
        real = torch.ones(at.seen, dtype=torch.bool, device=device) if at.mask is None else at.mask[row].bool()
        even = 1 / torch.arange(1, at.seen + 1, dtype=torch.float64, device=device).clamp(max=reach)
        return cls(real, real.cumsum(0) - 1, torch.cat([even.new_zeros(1), even.cumsum(0)]))


@register("attention.act")
@dataclass(frozen=True)
class Act(AdjustMethod):
    """Attention calibration: sinks behind the first token draw less, what is freed goes to all other tokens alike."""

    meta_shape: ClassVar = {"heads": [[int]], str: object}

    beta: float = Field(0.4, ge=0, le=1, description="what is left of the attention that a sink draws")
    threshold: float = Field(0.1, ge=0, le=1, description="mean attention above which a token is a sink")
    times: float = Field(5.0, ge=0, description="guard: over even attention, how much more a sink draws; 0: no guard")
    queries: int = Field(16, ge=1, description="guard: tokens that have seen a sink before it counts; 1: no guard")
    edges: int = Field(2, ge=0, description="first and last layers that are left as they are")
    share: float = Field(0.1, gt=0, le=1, description="part of the heads that are tried, those of the largest sinks")
    heads: str | None = Field(None, description="head scores to try them by instead: a score step, or a file")
    filter: bool = Field(True, description="keep a head only if the loss on the data falls; false: take all that share")
    rows: int = Field(16, ge=2, description="of the data that the filter reads, once for each head that is tried")
    sure: float = Field(2.0, ge=0, description="standard errors by which the loss must fall")

    @property
    def needs_data(self) -> bool:
        return self.filter or self.heads is None

    def sample(self, run: Run) -> Sample:
        return first_rows(run, self.rows)

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"heads": by layer the heads that are adjusted, "tried": how many, "loss": [before, after] of the filter}."""
        return Record(run.memory.remember("heads", lambda: run.ranks.agree(helpful(self, model, run))))

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        check_chosen(record.meta["heads"], model, self.name)

    # ------------------------------------------------------------------------------------------ in a layer's attention

    def adjust(self, out: Tensor, at: Attended, live: Attachment) -> Tensor:
        chosen: list[int] = live.parts[self.place][1]["heads"][at.layer]
        if not chosen:
            return out
        out, rows = out.clone(), len(out)
        before = None if at.cache is None else at.cache.drawn_so_far(rows, len(chosen))
        drawn = out.new_zeros(rows, len(chosen), at.seen, dtype=torch.float32) if before is None else before
        last, mass = torch.zeros_like(drawn), out.new_zeros(out.shape[1], dtype=torch.float64)
        for row in range(rows):
            text = Text.of(at, row)
            for group, places in grouped(chosen, out.shape[1] // at.keys.shape[1]).items():
                heads = [chosen[place] for place in places]
                sums, newest, found = self._adjust(out[row], (row, group, heads), at, text, drawn[row, places])
                drawn[row, places], last[row, places] = sums, newest
                mass[heads] += found
        if at.cache is not None:
            at.cache.note_drawn(drawn, last)
        counter = live.stats.setdefault(at.layer, Drawn(torch.zeros_like(mass)))
        counter.mass += mass
        counter.queries += rows * at.query.shape[2] if at.mask is None else int(at.mask[:, at.first:].sum())
        return out

    def _adjust(self, out: Tensor, which: tuple[int, int, list[int]], at: Attended, text: Text,
                drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adjust some heads of `out` [H, T, D], all of one KV head, in place.

        drawn: [c, seen] before these queries. Gives it after them; what of it the newest one has added; and the mass
        of the sinks [c].
        """
        row, group, heads = which
        keys, values, j, bias = at.of_head(row, group)
        learned = None if at.rule.sinks is None else at.rule.sinks.float()[heads, None, None]
        query, sums, mass = at.query[row, heads], drawn[:, j], drawn.new_zeros(len(heads), dtype=torch.float64)
        size, total = max(1, ENTRIES // (len(heads) * len(j))), query.shape[1]
        for start in range(0, total, size):
            part = slice(start, min(start + size, total))
            i = torch.arange(at.first + part.start, at.first + part.stop, device=j.device)
            visible = at.rule.visible(i, j) & text.real[j] & text.real[i, None]
            logits = at.rule.logits(query[:, part], keys[None])
            weights = softmax(logits if bias is None else logits + bias, visible, learned)           # [c, t, n]
            running = sums[:, None] + weights.detach().cumsum(1)
            sinks = self.sinks(running, text, i, j) & visible
            sums, newest = running[:, -1], weights[:, -1].detach()
            if bool(sinks.any()):
                new, found = calibrated(weights, sinks, values, self.beta)
                changed = sinks.any(-1, keepdim=True)
                out[heads, part] = torch.where(changed, new.to(out.dtype), out[heads, part])
                mass += found.detach().sum(1).double()
        return drawn.index_copy(1, j, sums), torch.zeros_like(drawn).index_copy(1, j, newest), mass

    def sinks(self, drawn: Tensor, text: Text, i: Tensor, j: Tensor) -> Tensor:      # [c, t, n], [t], [n] -> [c, t, n]
        """Which of the tokens j are sinks to the queries i, by what they have drawn by then."""
        one, other = text.place[i, None], text.place[j]
        seen = one - other + 1                                                                          # [t, n]
        even = text.even[one + 1] - text.even[other]
        least = torch.maximum(self.threshold * seen, self.times * even).float()
        return (drawn > least) & (seen >= self.queries) & (other > 0)


def calibrated(weights: Tensor, sinks: Tensor, values: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Attention [c, t, D] by `weights` [c, t, n] with their `sinks` turned down to `beta`, and what sinks drew [c, t].

    A row in which nothing but sinks draws anything stays as it is.
    """
    rest, mass = (weights.masked_fill(mask, 0).sum(-1, keepdim=True) for mask in (sinks, ~sinks))       # [c, t, 1]
    grown = 1 + (1 - beta) * mass / rest.clamp(min=torch.finfo(rest.dtype).tiny)
    factors = torch.where(sinks, beta, grown).where(rest > 0, 1.0)
    return (weights * factors) @ values.float(), mass.squeeze(-1)


def grouped(heads: list[int], group: int) -> dict[int, list[int]]:
    """{KV head: the places in `heads` of its query heads}, `group` of them to a KV head."""
    found: dict[int, list[int]] = {}
    for place, head in enumerate(heads):
        found.setdefault(head // group, []).append(place)
    return found
