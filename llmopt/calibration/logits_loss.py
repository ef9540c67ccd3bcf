"""How far a model's predictions are from the dense model's, as a function of its parameters.

    loss = mean over the real tokens of KL(dense || model)          in nats
         + hidden * sum_t |h_t - dense h_t|^2 / sum_t |dense h_t|^2           h: what the decoder gives

Of the dense model the decoder's outputs are kept, not the logits. Slopes of the logits are taken for some tokens at a
time, and go back through the blocks together.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmopt.calibration.data import Batch
from llmopt.model.blocks import decoder
from llmopt.model.head import LOGITS, logits_of


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Batch]) -> list[Tensor]:                # [B, T, E] each
    """What the decoder gives for each batch."""
    return [_decoded(model, batch, {}) for batch in batches]


class LogitsLoss:
    """The loss with other parameters; call it with the index of a batch for that one's part of it.

    dense: `outputs` of the unedited model. parameters: gives, by their names, those that stand in the place of its own.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], dense: list[Tensor],
                 parameters: Callable[[], dict[str, Tensor]], hidden: float = 0.0):
        self.model, self.batches, self.dense = model, batches, dense
        self.parameters = parameters
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        masks = [batch["attention_mask"].bool() for batch in batches]
        size = sum(float(then[mask.to(then.device)].float().square().sum())
                   for then, mask in zip(dense, masks, strict=True)) if hidden else 1.0
        self.hidden = hidden / max(size, torch.finfo(torch.float32).tiny)
        self.rows = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])

    def __call__(self, index: int) -> Tensor:
        return self.behind(_decoded(self.model, self.batches[index], self.parameters()), index)

    def behind(self, hidden: Tensor, index: int) -> Tensor:                             # [B, T, E] -> ()
        """The loss of a batch for which the decoder gives `hidden`."""
        real = self.batches[index]["attention_mask"].bool().to(hidden.device)
        now, then = hidden[real], self.dense[index][real]                                               # [N, E]
        found = [self._part(*some) for some in zip(now.detach().split(self.rows), then.split(self.rows), strict=True)]
        slopes = torch.cat([slope for _, slope in found])
        return sum(loss for loss, _ in found) + ((now - now.detach()) * slopes).sum()

    def _part(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:                # [n, E] -> (), [n, E]
        """The loss of some tokens, and its slope in what the decoder gives for them."""
        with torch.no_grad():
            wanted = logits_of(self.model, then[None])[0].float().log_softmax(-1)
        now.requires_grad_(torch.is_grad_enabled())
        made = logits_of(self.model, now[None])[0].float().log_softmax(-1)
        loss = (wanted.exp() * (wanted - made)).sum() / self.tokens
        if self.hidden:
            loss = loss + self.hidden * (now.float() - then.float()).square().sum()
        slope = torch.autograd.grad(loss, now)[0] if now.requires_grad else torch.zeros_like(now)
        return loss.detach(), slope


def _decoded(model: nn.Module, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
    inner = decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is inner) + "."
    own = {name.removeprefix(prefix): value for name, value in weights.items()}
    given = {name: value.to(model.device) for name, value in batch.items()}
    return functional_call(inner, own, (), given | {"use_cache": False}).last_hidden_state
