"""How far a model's next-token probabilities are from the dense model's, as a function of its weights.

    loss = mean over the real tokens of KL(dense || model)          in nats

Of the dense model the decoder's outputs are kept, not the logits; the slopes of the logits are taken for some tokens at
a time, and go back through the blocks as one.
"""
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmopt.method import Run
from llmopt.model.head import LOGITS, logits_of
from llmopt.quant.latent import Gain, Latent


@torch.no_grad()
def outputs(model: nn.Module, run: Run) -> list[Tensor]:                            # [B, T, E] each
    """What the decoder gives for each batch."""
    return [_decoded(model, batch, {}) for batch in run.batches]


class LogitsLoss:
    """Call it with the index of a batch for that one's part of the loss."""

    def __init__(self, model: nn.Module, run: Run, dense: list[Tensor], latents: list[Latent], gains: list[Gain]):
        self.model, self.batches, self.dense = model, run.batches, dense
        self.latents, self.gains = latents, gains
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in run.batches)

    def __call__(self, index: int) -> Tensor:
        batch = self.batches[index]
        hidden = _decoded(self.model, batch, self.substitutes())
        real = batch["attention_mask"].bool().to(hidden.device)
        now, then = hidden[real], self.dense[index].to(hidden.device)[real]         # [N, E]
        loss, slopes = self._slopes(now.detach(), then)
        return loss + ((now - now.detach()) * slopes).sum()

    def substitutes(self) -> dict[str, Tensor]:
        made = {}
        for latent in self.latents:
            value, projection = latent.value(), latent.projection
            made[projection.key] = value.T if projection.transposed else value
        return made | {f"{gain.norm.name}.weight": gain.value() for gain in self.gains}

    def _slopes(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what it falls by with each entry of `now`."""
        total, slopes = now.new_zeros((), dtype=torch.float32), torch.zeros_like(now)
        for part in self._pieces(len(now)):
            with torch.no_grad():
                wanted = logits_of(self.model, then[None, part])[0].float().log_softmax(-1)
            some = now[part].requires_grad_(torch.is_grad_enabled())
            made = logits_of(self.model, some[None])[0].float().log_softmax(-1)
            loss = (wanted.exp() * (wanted - made)).sum() / self.tokens
            if torch.is_grad_enabled():
                slopes[part] = torch.autograd.grad(loss, some)[0]
            total += loss.detach()
        return total, slopes

    def _pieces(self, tokens: int) -> Iterator[slice]:
        step = max(1, LOGITS // self.model.get_output_embeddings().weight.shape[0])
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))


def _decoded(model: nn.Module, batch: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder) + "."
    own = {name.removeprefix(prefix): value for name, value in weights.items()}
    given = {name: value.to(model.device) for name, value in batch.items()}
    return functional_call(decoder, own, (), {**given, "use_cache": False}).last_hidden_state
