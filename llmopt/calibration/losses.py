"""How badly a model predicts a text: its loss and the slopes of that, a few tokens' logits in memory at a time."""
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmopt.model.head import LOGITS, logits_of


def target_shares(mask: Tensor) -> Tensor:      # [B, T] -> [B, T - 1]
    """The share of each next token in its sample's mean loss; 0 where the token or its target is padding."""
    real = (mask[:, 1:] * mask[:, :-1]).float()
    return real / real.sum(1, keepdim=True).clamp(min=1)


def losses(logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:      # [B, t, V], [B, t], [B, t] -> [B]
    """Cross-entropy of these tokens, in float32 at least, summed by their shares."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (cross_entropy(wide.transpose(1, 2), targets, reduction="none") * shares).sum(1)


@torch.no_grad()
def row_losses(model: nn.Module, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:      # [B, T, E] -> [B]
    """The samples' mean losses, of the decoder's output `hidden`, as many tokens at a time as LOGITS allows."""
    shares, total = target_shares(mask), torch.zeros(len(ids), device=hidden.device)
    for part in _pieces(model, shares):
        total += losses(logits_of(model, hidden[:, part]), ids[:, 1:][:, part], shares[:, part])
    return total


def _pieces(model: nn.Module, shares: Tensor) -> Iterator[slice]:
    """The targets [B, T - 1], some tokens at a time."""
    step = max(1, LOGITS // (len(shares) * model.get_output_embeddings().weight.shape[0]))
    for start in range(0, shares.shape[1], step):
        yield slice(start, min(start + step, shares.shape[1]))


def loss_slopes(model: nn.Module, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:      # [B, T, E]
    """dL/dhidden of the samples' mean losses, as many tokens at a time as LOGITS allows."""
    shares, found = target_shares(mask), torch.zeros_like(hidden)
    for part in _pieces(model, shares):
        some = hidden[:, part].detach().requires_grad_()
        total = losses(logits_of(model, some), ids[:, 1:][:, part], shares[:, part]).sum()
        found[:, part] = torch.autograd.grad(total, some)[0]
    return found


def drawn_slopes(model: nn.Module, hidden: Tensor, drawing: torch.Generator) -> Tensor:      # [B, T, E]
    """d log p(y)/dhidden, summed over the tokens, where y is drawn from the model's own prediction at each.

    Their squares are Fisher information. As many tokens at a time as LOGITS allows.
    """
    found = torch.zeros_like(hidden)
    for part in _pieces(model, hidden.new_ones(len(hidden), hidden.shape[1])):
        some = hidden[:, part].detach().requires_grad_()
        logs = logits_of(model, some).float().log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=drawing).view(*logs.shape[:2], 1)
        found[:, part] = torch.autograd.grad(logs.gather(-1, drawn).sum(), some)[0]
    return found


def odds_slopes(model: nn.Module, hidden: Tensor) -> Tensor:      # [B, T, E]
    """d log(p / (1 - p))/dhidden, summed over the tokens, where p is that of the successor that the model prefers.

    Unlike log p it goes on rising where the model is sure. As many tokens at a time as LOGITS allows.
    """
    found = torch.zeros_like(hidden)
    for part in _pieces(model, hidden.new_ones(len(hidden), hidden.shape[1])):
        some = hidden[:, part].detach().requires_grad_()
        logits = logits_of(model, some).float()
        best = logits.detach().argmax(-1, keepdim=True)
        others = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        found[:, part] = torch.autograd.grad((logits.gather(-1, best) - others).sum(), some)[0]
    return found
