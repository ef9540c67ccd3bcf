"""How far many edits of a model are from it, on one set of rows; those that begin alike share their beginning.

    D(s) = mean over tokens of KL(p || q_s),      p, q_s: softmax over the `support` largest logits of the dense model

An edit s is a tuple, its choice for each block. All of them go through the blocks side by side, a block's weights
being there once for all: hidden states belong to a beginning (s_0, ..., s_i), not to an edit. The last token of a row
predicts nothing and is left out. Everything is on the support, as Li et al., 2025 (arXiv:2503.09657): the dense model's
logits of a token take `support` numbers and not a vocabulary.
"""
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmopt.calibration.calls import logits_behind, record_calls
from llmopt.calibration.walk import Visit
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, layer_list
from llmopt.model.head import LOGITS

LISTS = 4           # of activations held at once: in front of the blocks, other arguments, before and behind a block
Edit = tuple[Hashable, ...]
Weights = Mapping[str, Tensor] | None       # by the name of a parameter in the block; None: the block is not there
Stands = Callable[[Block, Hashable], Weights]


class Prefixes:
    """Rows of single sequences of `lengths`, and the dense model's logits behind them.

    Each process has its part of the rows.
    """

    def __init__(self, model: nn.Module, run: Run, rows: list[dict[str, Tensor]], support: int):
        self.model, self.run = model, run
        own = run.ranks.span(len(rows))
        self.own, self.rows = range(own.start, own.stop), rows[own]
        self.lengths = [row["input_ids"].shape[1] for row in rows]
        self.memory = run.memory.reading.holding(LISTS)
        self.inputs, self.calls = record_calls(model, self.rows, self.memory)
        self.support = min(support, model.get_output_embeddings().weight.shape[0])
        dense = (None,) * len(layer_list(model))
        hidden = self._behind([dense], range(len(self.rows)), lambda block, choice: {})
        with self.memory.outside(model, head=True):
            self.dense = [self._largest(row, found) for row, found in zip(self.rows, hidden[dense], strict=True)]

    @torch.no_grad()
    def damage(self, edits: Sequence[Edit], rows: Sequence[int], weights: Stands,
               label: str = "KL of candidates") -> list[float]:
        """D of each edit on these of the rows, over all processes; weights: of a block under a choice."""
        own = [row - self.own.start for row in rows if row in self.own]
        hidden = self._behind(edits, own, weights, label)
        sums, count = dict.fromkeys(hidden, 0.0), sum(len(self.dense[row][0]) for row in own)
        with self.memory.outside(self.model, head=True):
            for edit, found in hidden.items():
                sums[edit] = sum(self._apart(row, x) for row, x in zip(own, found, strict=True))
        parts = self.run.ranks.gather((sums, count))
        tokens = sum(count for _, count in parts)
        found = [sum(sums[edit] for sums, _ in parts) / max(1, tokens) for edit in edits]
        if not all(0 <= value < float("inf") for value in found):
            raise LlmoptError("the divergence of a candidate from the dense model is not finite: its logits, or the "
                              "dense model's, hold NaN or Inf on the calibration data")
        return found

    @torch.no_grad()
    def _behind(self, edits: Sequence[Edit], rows: Sequence[int], weights: Stands,
                label: str = "dense logits") -> dict[Edit, list[Tensor]]:
        """The hidden states behind the last block, of each edit for each of the rows [1, T, E]."""
        ahead: dict[Edit, list[Tensor]] = {(): [self.inputs[row] for row in rows]}
        for index in self.run.progress(range(len(layer_list(self.model))), label):
            before, ahead, hold = ahead, {}, self.memory.keeper()
            with self.memory.block(self.model, index):
                block, made = blocks(self.model)[index], {}
                for prefix in dict.fromkeys(edit[:index + 1] for edit in edits):
                    choice, inputs = prefix[-1], before[prefix[:-1]]
                    if choice not in made:
                        made[choice] = weights(block, choice)
                    own = made[choice]
                    visit = Visit(self.model, block, inputs, [self.calls[index][row] for row in rows], [])
                    ahead[prefix] = inputs if own is None else [hold(visit.forward(i, dict(own) or None))
                                                                for i in range(len(rows))]
        return {edit: ahead[edit] for edit in dict.fromkeys(edits)}

    def _largest(self, row: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, their tokens) of the support, [T - 1, support] each."""
        found = [(values, index.int()) for values, index in
                 (logits.topk(self.support) for logits in self._logits(row, hidden))]
        return torch.cat([values for values, _ in found]), torch.cat([index for _, index in found])

    def _apart(self, row: int, hidden: Tensor) -> float:
        """The sum of KL(p || q) over the tokens of a row."""
        total, start = 0.0, 0
        for logits in self._logits(self.rows[row], hidden):
            part = slice(start, start + len(logits))
            values, index = (known[part] for known in self.dense[row])
            total += float(divergence(values, logits.gather(-1, index.long())).double().sum())
            start = part.stop
        return total

    def _logits(self, row: dict[str, Tensor], hidden: Tensor) -> Iterator[Tensor]:
        """Logits [t, V] in float32 of all tokens of a row but the last, some at a time."""
        step = max(1, LOGITS // self.model.get_output_embeddings().weight.shape[0])
        for start in range(0, hidden.shape[1] - 1, step):
            part = slice(start, min(start + step, hidden.shape[1] - 1))
            yield logits_behind(self.model, {name: x[:, part] for name, x in row.items()}, hidden[:, part])[0].float()


def divergence(dense: Tensor, other: Tensor) -> Tensor:      # [t, support] logits each -> [t]
    """KL(p || q) of each token, p and q the softmax of these logits."""
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
