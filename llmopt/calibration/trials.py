"""What sets of choices cost: the KL of a model to its dense self, on a few rows of the calibration data, in one walk.

    D(s) = mean over tokens of KL(dense || the model with the weights of trial s)        in nats

The hidden states of all trials go through the blocks side by side, beside those of the dense model. A trial that
differs from another one first in some block branches off there. Blocks run with other weights in the place of their
own, or are left out; none is written, so that the model may be larger than memory, and each trial runs only from its
branch on.
"""
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llmopt.calibration.calls import decoded_behind, logits_behind
from llmopt.calibration.losses import row_losses
from llmopt.calibration.walk import Visit, walk
from llmopt.method import Run
from llmopt.model.blocks import Block

LISTS = 5           # of activations held at once: the walk's, and those of all trials before and behind a block
Weights = Mapping[str, Tensor]          # what stands in the place of a projection's weight [out, in], or of a parameter


class Trials:
    """Trials by name on this process's part of the rows.

    batches: further rows that `visits` goes through, for the caller. start: trials that are told apart from block 0 on.
    """

    def __init__(self, model: nn.Module, run: Run, rows: list[dict[str, Tensor]], start: tuple[Hashable, ...]):
        self.model, self.run = model, run
        self.rows = run.ranks.share(rows)
        self.hidden: dict[Hashable, list[Tensor] | None] = dict.fromkeys(start)     # None: the dense model's yet
        self.dense: list[Tensor] = []
        self.memory = run.memory.reading.holding(LISTS)

    def visits(self, batches: list[dict[str, Tensor]], label: str) -> Iterator[tuple[Visit, Visit]]:
        """The blocks in order: (a visit with `batches`, one with the rows); the caller calls `through` for each."""
        count, last = len(batches), None
        for visit in walk(self.model, [*batches, *self.rows], self.run.progress, label, self.memory):
            last = visit
            yield part(visit, slice(0, count)), part(visit, slice(count, None))
        self.dense = last.outputs_after_edit[count:]

    @torch.no_grad()
    def through(self, visit: Visit, weights: Callable[[Hashable], Weights | None],
                branches: Mapping[Hashable, Hashable] | None = None) -> None:
        """Take all trials through the block of a visit with the rows.

        weights: what a trial has in place of the block's; None: it goes without the block. branches: new trials, each
        with the one that it leaves here.
        """
        hold, ahead = self.memory.keeper(), {}
        jobs = [*((name, name) for name in self.hidden), *(branches or {}).items()]
        for name, origin in self.run.progress(jobs, "trials"):
            before = visit.inputs if self.hidden[origin] is None else self.hidden[origin]
            changed = weights(name)
            if changed is None:
                ahead[name] = before
                continue
            here, own = replace(visit, inputs=before), in_block(visit.block, changed)
            ahead[name] = [hold(here.forward(index, own)) for index in range(len(self.rows))]
        self.hidden = ahead

    @torch.no_grad()
    def damage(self) -> dict[Hashable, float]:
        """D of every trial, over the rows of all processes, once the last block is behind them."""
        sums, count = dict.fromkeys(self.hidden, 0.0), 0
        with self.memory.outside(self.model, head=True):
            for index in self.run.progress(range(len(self.rows)), "KL of trials"):
                row = self.rows[index]
                p = _log_probs(self.model, row, self.dense[index])
                count += len(p)
                for name, hidden in self.hidden.items():
                    q = _log_probs(self.model, row, hidden[index])
                    sums[name] += float((p.exp() * (p - q)).sum(-1).clamp(min=0).double().sum())
        return self._mean(sums, count)

    @torch.no_grad()
    def losses(self) -> dict[Hashable, float]:
        """The mean next-token loss of every trial, over the rows of all processes, in the same manner."""
        sums = dict.fromkeys(self.hidden, 0.0)
        with self.memory.outside(self.model, head=True):
            for index in self.run.progress(range(len(self.rows)), "losses of trials"):
                row = self.rows[index]
                ids, mask = (row[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
                for name, hidden in self.hidden.items():
                    decoded = decoded_behind(self.model, row, hidden[index])
                    sums[name] += float(row_losses(self.model, decoded, ids, mask).double().sum())
        return self._mean(sums, len(self.rows))

    def turned(self) -> dict[Hashable, float]:
        """1 - the mean cosine between what the last block gives in every trial and in the dense model."""
        sums = {name: sum(turned(there, dense) for there, dense in zip(hidden, self.dense, strict=True))
                for name, hidden in self.hidden.items()}
        return self._mean(sums, sum(row["input_ids"].numel() for row in self.rows))

    def _mean(self, sums: dict[Hashable, float], count: int) -> dict[Hashable, float]:
        """Sums over this process's `count` tokens, or rows, as means over those of all."""
        parts = self.run.ranks.gather((sums, count))
        total = sum(count for _, count in parts)
        return {name: sum(found[name] for found, _ in parts) / total for name in sums}


def part(visit: Visit, batches: slice) -> Visit:
    """The visit with some of its batches."""
    return replace(visit, inputs=visit.inputs[batches], calls=visit.calls[batches], masks=visit.masks[batches])


def sample(batches: list[dict[str, Tensor]], seed: int, tokens: int) -> list[dict[str, Tensor]]:
    """Single rows of the calibration set, in an order drawn by `seed`, up to so many tokens (at least one row)."""
    rows = [{k: v[i:i + 1, :int(b["attention_mask"][i].sum())] for k, v in b.items()}
            for b in batches for i in range(len(b["input_ids"]))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, total = [], 0
    for index in order:
        total += rows[index]["input_ids"].shape[1]
        if kept and total > tokens:
            break
        kept.append(rows[index])
    return kept


def turned(one: Tensor, other: Tensor) -> float:                                    # [B, T, E] each
    """1 - the cosine between two hidden states, summed over the tokens."""
    return float((1 - cosine_similarity(one.double(), other.double(), dim=-1)).sum())


def without(block: Block, parts: Collection[str]) -> dict[str, Tensor]:
    """By the name of a parameter, what makes parts of a block ("attention", "mlp") add nothing: writers of zeros."""
    writers = [writer for part, writer in (("attention", block.attn_out), ("mlp", block.ffn_out))
               if part in parts and writer is not None]
    return {f"{writer.path}.{name}": torch.zeros_like(parameter) for writer in writers
            for name, parameter in writer.module.named_parameters()}


def in_block(block: Block, weights: Weights) -> dict[str, Tensor] | None:
    """The weights as parameters by their names in the block."""
    known, found = {p.name: p for group in block.weights() for p in group}, {}
    for name, tensor in weights.items():
        weight = known.get(name)
        key = (name if weight is None else weight.key).removeprefix(f"{block.name}.")
        tensor = tensor.T if weight is not None and weight.transposed else tensor
        if weight is None or weight.expert is None:
            found[key] = tensor
        else:                                               # one matrix of a stack, whose others stay
            if key not in found:
                found[key] = getattr(weight.module, weight.parameter).detach().clone()
            found[key][weight.expert] = tensor
    return found or None


def _log_probs(model: nn.Module, row: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return logits_behind(model, row, hidden)[0].float().log_softmax(-1)                    # [T, vocabulary]
