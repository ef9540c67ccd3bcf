"""SmoothQuant: outliers of the activations behind a norm move into the weights that read them.

    y = W x = (W diag(s)) (x / s)          s_j = max_t |x_tj|^alpha / max_i |W_ij|^(1 - alpha)

The maximum over i goes through all readers of the norm; 1 / s goes into its gain. With alpha = 1/2 inputs and weights
have the same largest sizes in each channel, which is for activations in 8 bits; 0 looks at the weights alone, 1 at the
inputs. Channels that are always 0 stay. Xiao et al., arXiv:2211.10438.

Left out: the inputs of the writers, which no norm produces.
"""
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Block, refuse_folding
from llmopt.model.links import Norm
from llmopt.parts import register
from llmopt.transform.base import Figures, Transform

LEAST = 1e-5            # of a scale


@register("transform.smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Flatter activations, for steps that round them."""

    uses_inputs: ClassVar = True

    alpha: float = Field(0.5, ge=0, le=1, description="how much of the outliers' size moves into the weights")

    def refuse(self, model: nn.Module) -> None:
        refuse_folding(model)

    def block(self, block: Block, visit: Visit, run: Run) -> Figures:
        largest, peaks = largest_inputs(visit), {}
        for link in block.links():
            if isinstance(link.producer, Norm) and link.scalable:
                inputs = largest[link.readers[0].name]
                weights = torch.stack([reader.weight.abs().amax(0).float() for reader in link.readers]).amax(0)
                factor = self.factor(inputs, weights)
                link.scale_(1 / factor)
                peaks[link.producer.role] = [_peak(inputs), _peak(inputs / factor)]
        return {"peaks": peaks}

    def factor(self, inputs: Tensor, weights: Tensor) -> Tensor:                # [in], [in] -> [in]
        """What the columns of the weights are multiplied with, from the largest sizes in each channel."""
        factor = (inputs ** self.alpha / weights ** (1 - self.alpha)).clamp(min=LEAST)
        return torch.where((inputs > 0) & (weights > 0), factor, 1.0)


def largest_inputs(visit: Visit) -> dict[str, Tensor]:
    """max |x| [in] over the real tokens, by the name of the first projection of each group."""
    found: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            here = x.float().abs().amax(0)
            found[name] = torch.maximum(found.get(name, here), here)
        return take

    visit.observe({group[0].name: taker(group[0].name) for group in visit.block.groups()})
    return found


def _peak(sizes: Tensor) -> float:
    """How far the largest channel stands out: its size over the mean of all."""
    return float(sizes.max() / sizes.mean())
