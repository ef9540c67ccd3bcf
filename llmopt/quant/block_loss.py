"""How far a block's output is from what the dense model writes there, as a function of the block's weights.

    loss = sum_t r_t |f(x_t; weights) - y_t|^2 / |y_t|^2  /  sum_t r_t            over the real tokens of all batches

x: what the blocks before it, edited already, give; y: the unedited block's output in the dense model's stream. r: what
a token counts (tokens.py). Each error is a share of its own token, as the norms behind make it one: where the first
token carries massive activations, hundreds of times as long as others, a sum of plain squares sees no other token.
"""
import torch
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.quant.latent import Gain, Latent, substitutes

SMALLEST = torch.finfo(torch.float32).tiny
LEAST = 1e-6        # of the tokens' mean |y|^2: tokens of less count as if they had it


class BlockLoss:
    """The loss of one block with these weights and norms; call it with the index of a batch for that one's part."""

    @torch.no_grad()
    def __init__(self, visit: Visit, latents: list[Latent], gains: list[Gain], weights: list[Tensor] | None):
        self.visit, self.latents, self.gains = visit, latents, gains
        self.wanted = list(visit.outputs()) if visit.wanted is None else visit.wanted
        self.masks = [mask.to(out.device) for mask, out in zip(visit.masks, self.wanted, strict=True)]
        energies = [self._real(index, out).square().sum(1) for index, out in enumerate(self.wanted)]
        counts = [torch.ones_like(energy) if weights is None else weights[index].to(energy)
                  for index, energy in enumerate(energies)]
        least = LEAST * torch.cat(energies).mean().clamp(min=SMALLEST / LEAST)
        total = torch.cat(counts).sum().clamp(min=SMALLEST)
        self.shares = [count / energy.clamp(min=least) / total for count, energy in zip(counts, energies, strict=True)]

    def __call__(self, index: int) -> Tensor:
        prefix = f"{self.visit.block.name}."
        given = {name.removeprefix(prefix): value for name, value in substitutes(self.latents, self.gains).items()}
        out = self.visit.forward(index, given)
        wanted = self._real(index, self.wanted[index].to(out.device))
        return ((self._real(index, out) - wanted).square().sum(1) * self.shares[index]).sum()

    def _real(self, index: int, hidden: Tensor) -> Tensor:
        return hidden[self.masks[index]].float()                                    # [N, E]
