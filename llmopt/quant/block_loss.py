"""How far a block's output is from what the dense model writes there, as a function of the block's weights.

    loss = sum_t r_t |f(x_t; weights) - y_t|^2 / sum_t r_t |y_t|^2            over the real tokens of all batches

x: what the blocks before it, edited already, give; y: the unedited block's output in the dense model's stream. r: what
a token counts (tokens.py).
"""
import torch
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.quant.latent import Gain, Latent, substitutes


class BlockLoss:
    """The loss of one block with these weights and norms; call it with the index of a batch for that one's part."""

    @torch.no_grad()
    def __init__(self, visit: Visit, latents: list[Latent], gains: list[Gain], weights: list[Tensor] | None):
        self.visit, self.latents, self.gains = visit, latents, gains
        self.wanted = list(visit.outputs()) if visit.wanted is None else visit.wanted
        self.masks = [mask.to(out.device) for mask, out in zip(visit.masks, self.wanted, strict=True)]
        self.weights = None if weights is None else [weight.to(out.device).unsqueeze(1)
                                                     for weight, out in zip(weights, self.wanted, strict=True)]
        self.energy = float(sum(self._weighed(index, self._real(index, self.wanted[index]))
                                for index in range(len(self.masks)))) or 1.0

    def __call__(self, index: int) -> Tensor:
        prefix = f"{self.visit.block.name}."
        given = {name.removeprefix(prefix): value for name, value in substitutes(self.latents, self.gains).items()}
        out = self.visit.forward(index, given)
        wanted = self._real(index, self.wanted[index].to(out.device))
        return self._weighed(index, self._real(index, out) - wanted) / self.energy

    def _real(self, index: int, hidden: Tensor) -> Tensor:
        return hidden[self.masks[index]].float()                                    # [N, E]

    def _weighed(self, index: int, apart: Tensor) -> Tensor:
        squares = apart.square()
        return (squares if self.weights is None else squares * self.weights[index]).sum()
