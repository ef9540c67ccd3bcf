"""Reads a 4-D attention mask as causal attention within consecutive sequences, where it is that and nothing else."""
from dataclasses import replace

import torch
from llmopt_kernels import NONE, Rule
from torch import Tensor

from llmopt.errors import LlmoptError

HIDDEN = -1e4       # additive masks: what is at most this hides a key, 0 shows it


def packed_sequences(mask: Tensor, rule: Rule) -> tuple[Tensor, Rule]:
    """The sequence of every key, int64 [B, S], NONE for keys that no query sees; and the rule within a sequence.

    mask: bool, or 0 and about -inf, [B, 1 or H, T, S], of the last T tokens. A mask that leaves out the window of a
    sliding layer is taken at its word, as other attention functions do. LlmoptError for any other pattern.
    """
    shown = _shown(mask)
    for window in dict.fromkeys((rule.window, None)):
        within = replace(rule, window=window)
        rows = [_sequences_of(row, within) for row in shown]
        if all(row is not None for row in rows):
            return torch.stack(rows), within
    raise LlmoptError("the attention_mask is 4-D and not causal attention within consecutive sequences")


def _shown(mask: Tensor) -> Tensor:
    """bool [B, T, S]: which keys a 4-D mask shows."""
    shown = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((shown | (mask <= HIDDEN)).all()):
        raise LlmoptError("the attention_mask is 4-D and adds numbers to the logits")
    if not bool((shown == shown[:, :1]).all()):
        raise LlmoptError("the attention_mask is 4-D and differs from head to head")
    return shown[:, 0]


def _sequences_of(shown: Tensor, rule: Rule) -> Tensor | None:
    """The sequences of one row of the batch, int64 [S], from bool [T, S]; None if the mask says anything else."""
    tokens, total = shown.shape
    columns = torch.arange(total - tokens, total, device=shown.device)
    real = shown[torch.arange(tokens, device=shown.device), columns]                     # a token that sees itself
    asked, seen = columns[real], shown[real]                                             # [t], [t, S]
    sequence = torch.full((total,), NONE, device=shown.device)
    if len(asked) == 0:
        return sequence
    goes_on = seen[1:].gather(1, asked[:-1, None]).squeeze(1)                            # it sees the one before
    sequence[asked] = torch.nn.functional.pad((~goes_on).long().cumsum(0), (1, 0))
    sequence[:total - tokens].masked_fill_(seen[0, :total - tokens], 0)
    place = (sequence != NONE).long().cumsum(0) - 1
    told = rule.visible(place[asked], torch.where(sequence == NONE, NONE, place))
    told &= sequence[asked].unsqueeze(1) == sequence
    return sequence if bool((told == seen).all()) else None
