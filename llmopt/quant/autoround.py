"""AutoRound: which way each weight of a block is rounded, learned by the sign of the slope of the block's error.

    c = clamp(round(w / s + V) + z),   s and z of the range times alpha and beta;   V in -1/2 .. 1/2
    V, alpha, beta <- minus rate (1 - step / iterations) sign(d loss / d .),   rate = 1 / iterations

The loss (block_loss.py) is of the block behind the edited ones, against what the dense model writes; the best state is
kept. Cheng et al. (arXiv:2309.05516), and the tool AutoRound, whose `enable_quanted_input` this is: inputs of the
edited stream, targets of the dense one. `start: gptq` begins at the codes of quant.gptq instead of the nearest, w being
where these and the Hessian put it (start.py); that was no better where it was tried (README). A step takes one batch of
the calibration data; the state is judged on all of them some ten times, where the tool goes by the loss of each step's
own rows. Left out: momentum, gains and biases, grids of floats, losses scaled for float16.
"""
from collections.abc import Iterator

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.descent import Course, Knobs, descend
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.block_loss import BlockLoss
from llmopt.quant.block_solver import Begin, BlockSolver
from llmopt.quant.latent import Following, results
from llmopt.quant.start import Start


@register("autoround")
@dataclass(frozen=True)
class SignDescent(BlockSolver):
    """The rounding and the ranges of a block's weights, learned by the sign of the slope."""

    start: Begin = Field("rtn", description="whose codes to begin with: the nearest, or those of quant.gptq")
    iterations: int = Field(200, ge=0, description="steps for each block, a batch of the data each")
    lr: float | None = Field(None, gt=0, le=1, description="of the first step, in steps of the grid and parts of the "
                                                           "range; null: 1 / iterations")

    def improve(self, visit: Visit, starts: list[Start], weights: list[Tensor] | None,
                run: Run) -> Iterator[tuple[Projection, Quantized]]:
        latents = [Following(start) for start in starts]
        rate = self.lr or 1 / max(1, self.iterations)
        ends = [end for latent in latents for end in (latent.alpha, latent.beta)]
        knobs = [Knobs([latent.offset for latent in latents], rate, reach=0.5), Knobs(ends, rate)]
        batches = range(len(visit.inputs))
        losses = descend(BlockLoss(visit, latents, [], weights), batches, batches, knobs,
                         Course(self.iterations, signs=True, seed=run.seed))
        yield from results(latents, losses)


@register("quant.autoround")
@dataclass(frozen=True)
class AutoRound(SignDescent, Quantizer):
    """The rounding and the ranges of a block's weights, learned by the sign of the slope."""

    kind = "method"
