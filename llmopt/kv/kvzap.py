"""KVzap: a student that foretells what a second reading would look at, by one matrix product a layer.

    log s_j = w . f_j + level   f_j: x_j that the layer's attention reads, log(1 + j), log(n * expected attention),
                                log(n * votes of the last queries), |v_j|, -cos(k_j, mean key), |k_j|
    w = (F^T F + r diag(F^T F))^-1 F^T log max(s, 1e-8)     per KV head, s: replay scores of other texts; r: `ridge` for
                                the hidden state's features, 3e-3 for the cheap ones, which carry over better;
                                F and log s as they differ from the mean of their text, level: mean of log s - w . f

Learning replay scores from hidden states is KVzap's (Jegou and Jeblick, 2026, arXiv:2601.07891); the cheap scores
among the features are ours, as parts of an even share of the n entries. So are the deviations from a text's mean: what
sets two texts apart does not tell which entries of one of them stay, and learned with the rest it misleads (of a text
with stories, plain sentences were thought of no use anywhere). An entry is judged once, when a compression
first sees it, and keeps its score. What it learns are KVzip's scores, or with `heads.replay: {plus: true}` KVzip+'s, as
in the paper. Left out: a second layer; the paper's fixed threshold.
"""
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.kv.base import Scorer
from llmopt.kv.expected import expected_attention
from llmopt.kv.keydiff import unlikeness
from llmopt.kv.listener import replays_of, watch
from llmopt.kv.snapkv import votes
from llmopt.kv.view import LayerKV
from llmopt.method import Record, Replayed, Run
from llmopt.model.blocks import Block, blocks
from llmopt.model.modeling import put_tensor, tensors_below
from llmopt.parts import register

LEAST = 1e-8                            # of replay scores, which are 0 where nothing looks
SINKS, AHEAD, VOTERS, POOL = 4, 512, 32, 5              # of the cheap scores; weights are learned for these
CHEAP = 5                               # features of an entry that differ from head to head
RIDGE = 3e-3                            # of the features beside the hidden state
DEAD = 1e-5                             # parts of its level within which a feature that varies is rounding
RANGE = -60.0, 60.0                     # of log scores, so that their exp is a positive number


@register("kv.kvzap")
@dataclass(frozen=True)
class KVzap(Scorer):
    """What a second reading would look at, foretold by a regression on the texts of heads.replay; no second reading."""

    hidden: ClassVar = True
    learns: ClassVar = True

    sinks: int = Field(4, ge=0, description="first tokens, always kept")
    window: int = Field(4, ge=0, description="last tokens, always kept")
    features: Literal["all", "hidden"] = Field("all", description="hidden: without the cheap scores, a token by itself")
    ridge: float = Field(1.0, ge=1e-6, le=1000, description="added to the second moment of each of the hidden state's "
                                                            "features, as a part of it; more with few texts")

    def queries(self) -> int | None:
        return None if self.features == "all" else 0

    def condense(self, hidden: Tensor, index: int, record: Record) -> Tensor:            # [B, T, G]
        """The hidden state's part of a token's log score."""
        weights = record.tensors[f"student.{index}"][:, :hidden.shape[-1]].to(hidden.device).float()
        return hidden.float() @ weights.T

    # ------------------------------------------------------------------------------------------ once, at apply

    def learn(self, model: nn.Module, run: Run) -> Record:
        pieces = replays_of(run, model, self.name)
        sums = {index: Sums(self._width(block)) for index, block in self._attending(model).items()}
        for piece in run.progress(pieces, self.name):
            watch(model, piece.ids, lambda kv, piece=piece: sums[kv.layer].add(*self._lesson(kv, piece)))
        return Record(tensors={f"student.{index}": sums[index].solve(self.ridge).float().cpu()
                               for index in self.weight_shapes(model)})

    def _lesson(self, kv: LayerKV, piece: Replayed) -> tuple[Tensor, Tensor]:
        """Features of a text's tokens [n, S]; of its entries, log replay scores behind them: [G, n, C + 1]."""
        places, (first, last) = kv.positions[0, 0].long(), piece.protected
        wanted = (places >= first) & (places < len(piece.ids) - last)
        scores = piece.scores[kv.layer].to(places.device)[:, places[wanted]].clamp(min=LEAST).log()
        tokens = torch.cat([kv.hidden[0].float(), self._beside(kv)], 1)
        return tokens[places[wanted]], torch.cat([self._of_entries(kv)[:, wanted], scores[..., None]], -1)

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        step = len(tensors_below(skeleton))
        for index, shape in self.weight_shapes(skeleton).items():
            put_tensor(skeleton, f"{step}.student.{index}", torch.empty(shape, device="meta"))
        return super().sketch(skeleton, run, source)

    @property
    def turns(self) -> bool:
        return self.features == "all"

    def weight_shapes(self, model: nn.Module) -> dict[int, list[int]]:
        """[G, F] of each layer that has attention: one row of weights for each KV head."""
        cheap = 1 + CHEAP if self.features == "all" else 0
        return {index: [block.kv_heads, self._width(block) + 1 + cheap]
                for index, block in self._attending(model).items()}

    @staticmethod
    def _attending(model: nn.Module) -> dict[int, Block]:
        return {block.index: block for block in blocks(model) if block.attention is not None}

    @staticmethod
    def _width(block: Block) -> int:
        """Size of what the layer's attention reads; behind it stands the constant feature."""
        return block.attn_in[0].in_features

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        wanted = {f"student.{index}": shape for index, shape in self.weight_shapes(model).items()}
        for name, tensor in record.tensors.items():
            if list(tensor.shape) != wanted.get(name) or not tensor.is_floating_point():
                raise LlmoptError(f"{self.name}: {name} is {tensor.dtype} {list(tensor.shape)}, this model needs "
                                  f"{'floats ' + str(wanted[name]) if name in wanted else 'no such tensor'}")

    def restore(self, model: nn.Module, record: Record) -> None:
        missing = [index for index in self.weight_shapes(model) if f"student.{index}" not in record.tensors]
        if missing:
            raise LlmoptError(f"{self.name}: the weights student.{missing[0]} are missing")
        super().restore(model, record)

    # ------------------------------------------------------------------------------------------ after a forward

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        weights = kv.record.tensors[f"student.{kv.layer}"].to(kv.keys.device).float()    # [G, F]
        entries, beside = self._of_entries(kv), self._beside(kv)
        apart = weights[:, -entries.shape[-1] - beside.shape[-1]:]                       # but for the hidden state's
        columns, places = kv.query_positions[0].long().contiguous(), kv.positions[0].long().contiguous()
        at = torch.searchsorted(columns, places).clamp(max=len(columns) - 1)             # [G, T]
        logs = (kv.hidden[0] + beside @ apart[:, :beside.shape[1]].T).T.gather(1, at)
        logs = logs + (entries @ apart[:, beside.shape[1]:, None]).squeeze(-1)
        before, new = kv.carried["zap"][0], columns[at] == places
        scores, known = torch.where(before > 0, before, logs.clamp(*RANGE).exp()), (before > 0) | new
        mean = (scores * known).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(known, scores, mean)[None]           # unknown: tokens that came under another method

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        return {"zap": scores}

    def _beside(self, kv: LayerKV) -> Tensor:                                            # [W, 1] or [W, 2]
        """A token's features beside its hidden state."""
        place = kv.query_positions[0].float()[:, None]
        return torch.cat([torch.ones_like(place), *([place.log1p()] if self.features == "all" else [])], 1)

    def _of_entries(self, kv: LayerKV) -> Tensor:                                        # [G, T, CHEAP] or [G, T, 0]
        if self.features == "hidden":
            return kv.keys.new_zeros(*kv.keys.shape[1:3], 0, dtype=torch.float32)
        even = (~kv.holes[0]).sum(-1, keepdim=True)                                      # [G, 1]
        shares = [expected_attention(kv, SINKS, AHEAD, kv.holes)[0], votes(kv, VOTERS, POOL)[0].float()]
        return torch.stack([*((share * even).clamp(min=LEAST).log() for share in shares),
                            kv.values[0].float().norm(dim=-1), unlikeness(kv)[0], kv.keys[0].float().norm(dim=-1)], -1)


class Sums:
    """The normal equations of a layer's heads, added up over texts; what the heads share is held once.

    All figures are deviations from the mean of their text. constant: the column of the tokens' features that is 1.
    """

    def __init__(self, constant: int):
        self.constant = constant
        self.texts = self.count = 0
        self.level: Any = 0.0           # [G, S + C + 1], means of the texts, added up
        self.tokens: Any = 0.0          # [S, S]
        self.mixed: Any = 0.0           # [G, S, C + 1]
        self.entries: Any = 0.0         # [G, C + 1, C + 1]

    def add(self, tokens: Tensor, entries: Tensor) -> None:
        """One text: features of tokens [n, S]; of entries, the target behind them [G, n, C + 1]."""
        tokens, entries = tokens.double(), entries.double()
        means = tokens.mean(0, keepdim=True), entries.mean(1, keepdim=True)
        tokens, entries = tokens - means[0], entries - means[1]
        self.texts, self.count = self.texts + 1, self.count + len(tokens)
        self.level = self.level + torch.cat([means[0].expand(len(entries), -1), means[1][:, 0]], 1)
        self.tokens = self.tokens + tokens.T @ tokens
        self.mixed = self.mixed + tokens.T @ entries
        self.entries = self.entries + entries.mT @ entries

    def solve(self, ridge: float) -> Tensor:
        """The weights [G, S + C]; that of the constant lifts the others' mean to the texts' mean.

        ridge: of the features in front of the constant, the hidden state's.
        """
        shared = self.tokens.expand(len(self.entries), -1, -1)
        whole = torch.cat([torch.cat([shared, self.mixed], 2), torch.cat([self.mixed.mT, self.entries], 2)], 1)
        spread, level = whole.diagonal(dim1=1, dim2=2)[:, :-1], self.level / self.texts
        dead = spread <= self.count * (DEAD * level[:, :-1]).square()                    # keys of one length, say
        square = whole[:, :-1, :-1].masked_fill(dead[:, None] | dead[:, :, None], 0)
        target = whole[:, :-1, -1:].masked_fill(dead[..., None], 0)
        moments = spread.clamp(min=1e-9)
        ridges = torch.full_like(moments[0], RIDGE)
        ridges[:self.constant] = ridge
        root = torch.linalg.cholesky(square + torch.diag_embed(ridges * moments))
        weights = torch.cholesky_solve(target, root)[..., 0]
        weights[:, self.constant] = level[:, -1] - (weights * level[:, :-1]).sum(1)
        return weights
