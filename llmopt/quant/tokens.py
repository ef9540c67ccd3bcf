"""How much each token of the calibration data counts in the second moments: the pieces behind `tokens`.

    r_t = least + (1 - least) (s_t - min s) / (max s - min s),      w_t = r_t^p / mean r^p      over the tokens of a row
    H = (2 / N) sum_t w_t x_t x_t^T

s is measured in front of each block, behind the blocks that are quantized already, and holds for all weights of it.
RSQ, Sung et al., arXiv:2503.01820: attention concentration did best there. Its text squares r (power: 2), its code does
not. The first token often draws most of the attention: it then makes all others alike, unless `sinks` leaves it out of
the maximum or `quantile` takes a lower one; scores above it count as the largest.

Left out: binning of the scores, and leaving out the least ones altogether.
"""
from abc import ABC, abstractmethod

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.parts import Part, register
from llmopt.runtime.attention_rows import Rows


class TokenWeights(Part, ABC):
    """Weights r_t of the tokens in H = (2 / N) sum_t r_t x_t x_t^T, block by block."""

    kind = "token weight"

    @abstractmethod
    def weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        """[N] for the real tokens of each batch, >= 0; None: all alike.

        The visit shows this process's rows, run.own_batches, alone; the weights of a row may depend on nothing but that
        row and what all processes have, such as run.batches.
        """


@register("alike")
@dataclass(frozen=True)
class Alike(TokenWeights):
    """Every token counts as much as the others."""

    def weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        return None


@dataclass(frozen=True)
class Importance(TokenWeights):
    """Weights between `least` and 1 by a score of each token, then over their mean in the row."""

    least: float = Field(0.01, ge=0, le=1, description="what the least token counts, where the most important counts 1")
    power: int = Field(1, ge=1, le=4, description="of what a token counts: 1 as in RSQ's code, 2 as in its text")
    sinks: int = Field(0, ge=0, description="first tokens of a row that do not say what the largest score is")
    quantile: float = Field(1.0, gt=0, le=1, description="of the scores of a row, that is taken for the largest")

    @abstractmethod
    def scores(self, visit: Visit, run: Run) -> list[Tensor] | None:
        """[B, T] for each batch, larger where a token is more important; padding is not looked at. None: all alike."""

    def weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        found = self.scores(visit, run)
        if found is None:
            return None
        return [torch.cat([self.counted(row[real]) for row, real in zip(scores, mask.to(scores.device), strict=True)])
                for scores, mask in zip(found, visit.masks, strict=True)]

    def counted(self, scores: Tensor) -> Tensor:                                    # [n] -> [n], mean 1
        """The weights of a row's tokens; all alike where the scores are."""
        if not len(scores):
            return scores.float()
        scores = scores.double()
        rated = scores[self.sinks:] if self.sinks < len(scores) else scores
        low, high = scores.min(), rated.quantile(self.quantile)
        shares = ((scores - low) / (high - low)).clamp(max=1) if high > low else torch.ones_like(scores)
        counted = (self.least + (1 - self.least) * shares) ** self.power
        return (counted / counted.mean()).float() if counted.any() else torch.ones_like(scores).float()


@register("attncon")
@dataclass(frozen=True)
class AttentionConcentration(Importance):
    """The attention that a token draws, summed over all heads and all queries of its row."""

    def scores(self, visit: Visit, run: Run) -> list[Tensor] | None:
        if visit.block.attention is None:
            return None
        sums = [torch.zeros(mask.shape, device=x.device) for mask, x in zip(visit.masks, visit.inputs, strict=True)]

        def add(batch: int, rows: Rows) -> None:
            weights = rows.weights * rows.real[:, None, :, None]                    # [B, H, t, S]
            sums[batch][:, rows.keys] += weights.sum((1, 2)).to(sums[batch].device)

        visit.attention(add)
        return sums


@register("actnorm")
@dataclass(frozen=True)
class ActivationNorm(Importance):
    """The length of a token's hidden state in front of the block."""

    def scores(self, visit: Visit, run: Run) -> list[Tensor]:
        return [x.float().norm(dim=-1) for x in visit.inputs]


@register("actdiff")
@dataclass(frozen=True)
class ActivationChange(Importance):
    """How little the block changes a token's hidden state."""

    def scores(self, visit: Visit, run: Run) -> list[Tensor]:
        return [-(after.float() - before.to(after.device).float()).norm(dim=-1)
                for before, after in zip(visit.inputs, visit.outputs(), strict=True)]


@register("tokensim")
@dataclass(frozen=True)
class TokenSimilarity(Importance):
    """How unlike the others of its row a token's hidden state is: the mean squared distance to them."""

    def scores(self, visit: Visit, run: Run) -> list[Tensor]:
        return [_distances(x.double(), mask.to(x.device)) for x, mask in zip(visit.inputs, visit.masks, strict=True)]


@register("tokenfreq")
@dataclass(frozen=True)
class TokenFrequency(Importance):
    """How rare a token is in the calibration data of all processes."""

    def scores(self, visit: Visit, run: Run) -> list[Tensor]:
        counts = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in run.batches]).bincount()
        return [-counts[batch["input_ids"] * batch["attention_mask"]] for batch in run.own_batches]


@register("firstn")
@dataclass(frozen=True)
class FirstTokens(TokenWeights):
    """The first part of each row alone."""

    parts: int = Field(8, ge=1, description="equal parts of a row, of which the first one counts")

    def weights(self, visit: Visit, run: Run) -> list[Tensor]:
        return [torch.cat([self.first(int(real.sum())) for real in mask]) for mask in visit.masks]

    def first(self, tokens: int) -> Tensor:                                         # [n], mean 1
        kept = max(1, tokens // self.parts)
        return (torch.arange(tokens) < kept) * (tokens / kept)


def _distances(x: Tensor, mask: Tensor) -> Tensor:                                  # [B, T, E], [B, T] -> [B, T]
    """mean_u |x_t - x_u|^2 over the real tokens u of a row = |x_t|^2 - 2 x_t mean(x) + mean |x|^2."""
    real = mask[..., None] / mask.sum(1)[:, None, None].clamp(min=1)                # [B, T, 1]
    centre, length = (x * real).sum(1, keepdim=True), x.square().sum(-1)
    return length - 2 * (x * centre).sum(-1) + (length * real[..., 0]).sum(1, keepdim=True)
