"""What a set of choices costs: the KL of a model to its dense self, measured on a few rows of the calibration data.

    D(picks) = mean over tokens of KL(dense || the picked weights in their places, the rest as it is)     in nats

A choice is whatever a method has to choose from: bits of a group, a share that is pruned, a plan of a whole block.
"""
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmopt.model.weights import Projection

LOGITS = 1 << 27    # dense log-probabilities that are kept: at most this many (half a GiB)
TOKENS = 2048       # and of at most this many tokens: every set of choices costs one forward pass over them
Change = tuple[Projection, Callable[[], Tensor]]        # a weight, and what gives the new one [out, in] each time
Choices = Mapping[str, Mapping[Hashable, Sequence[Change]]]     # unit -> choice -> what it changes; none: dense


class Trial:
    """A model whose units take choices; `restore` ends it.

    rows: batches of one row, see `sample`. Keeps a copy of the weights that any choice changes, and the dense
    log-probabilities of the rows.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, rows: list[dict[str, Tensor]], choices: Choices):
        self.model, self.rows, self.choices = model, rows, choices
        self.dense = [_log_probs(model, row) for row in rows]
        touched = {unit: {p.name: p for changes in of.values() for p, _ in changes} for unit, of in choices.items()}
        self.kept = {unit: [(p, p.weight.clone()) for p in found.values()] for unit, found in touched.items()}

    @torch.no_grad()
    def of(self, picks: Mapping[str, Hashable]) -> float:
        """D of these units with these choices, the others as they are."""
        self.set(picks)
        total, count = 0.0, 0
        for row, p in zip(self.rows, self.dense, strict=True):
            q = _log_probs(self.model, row)
            total += float((p.exp() * (p - q)).sum(-1).clamp(min=0).double().sum())
            count += len(p)
        return total / count

    @torch.no_grad()
    def set(self, picks: Mapping[str, Hashable]) -> None:
        """Put the weights of these choices into the model; what a choice of the unit leaves alone is dense."""
        for unit, choice in picks.items():
            changed = {p.name: make for p, make in self.choices[unit][choice]}
            for projection, dense in self.kept[unit]:
                make = changed.get(projection.name)
                projection.write(dense if make is None else make())

    def restore(self) -> None:
        """Write the dense weights back."""
        for unit in self.kept.values():
            for projection, dense in unit:
                projection.write(dense)


def sample(batches: list[dict[str, Tensor]], seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Single rows of the calibration set, in an order drawn by `seed`, up to TOKENS and LOGITS (at least one)."""
    rows = [{k: v[i:i + 1, :int(b["attention_mask"][i].sum())] for k, v in b.items()}
            for b in batches for i in range(len(b["input_ids"]))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, total, most = [], 0, min(TOKENS, LOGITS // vocabulary)
    for index in order:
        total += rows[index]["input_ids"].shape[1]
        if kept and total > most:
            break
        kept.append(rows[index])
    return kept


def _log_probs(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v.to(model.device) for k, v in row.items()}, use_cache=False).logits
    return logits[0].float().log_softmax(-1)                                           # [T, vocabulary]
