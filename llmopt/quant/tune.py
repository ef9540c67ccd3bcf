"""Tuning: scales, codes and the norms' gains of a block learned by Adam, from the codes of a closed form.

    c = clamp(round(u + V)),   s = s_0 (1 + a),   gain = g_0 + mean|g_0| d            V, a, d = 0 at the beginning
    V, a, d <- Adam on the slope of the block's error, rates falling by half a cosine;   V in -0.45 .. 0.45

u is where the best place of a weight lies, all others of its row as they are (start.py): a code goes to its neighbour
where the block gains by it. The slope passes straight through roundings (Bengio et al., arXiv:1308.3432), scales are
signed and of the stored type in every step. The loss is AutoRound's (block_loss.py: behind the edited blocks, against
what the dense model writes). Every eighth batch of the data is held out where there are four at least, and the state
that does best on those is kept, the first one included. Gains stay ordinary weights of the checkpoint. Tuning of the
whole by blocks is that of OmniQuant (arXiv:2308.13137) and EfficientQAT (arXiv:2407.11062) in kind.

It is a solver, and no step of its own after quantization: the walk that hands blocks to solvers has the dense model's
stream, the commits of finished blocks and the resuming already, and one step leaves one record. Left out: biases, the
final norm, zero points, the logits as the objective.
"""
import time
from collections.abc import Callable, Iterator

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection, layer_list
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.block_loss import BlockLoss
from llmopt.quant.block_solver import BlockSolver
from llmopt.quant.descent import Course, Knobs, descend
from llmopt.quant.latent import Gain, Held, results
from llmopt.quant.start import Start

HELD, LEAST = 8, 4      # every which batch is held out, and of how many at least
REACH = 0.45            # of a step of the grid: how far a weight may go
CODES, SCALES = 0.12, 0.024     # learning rates, times the number of codes


@register("tune")
@dataclass(frozen=True)
class Tuning(BlockSolver):
    """Scales, codes and norms' gains of a block, learned by Adam."""

    steps: int = Field(60, ge=0, description="for each block, a batch of the data each")
    minutes: float | None = Field(None, gt=0, description="of learning by the clock, the same part of it for each "
                                                          "block; null: as long as the steps take")
    codes: float | None = Field(None, ge=0, le=1, description="learning rate of the codes, in steps of the grid; null: "
                                                              "0.12 / 2^bits")
    scales: float | None = Field(None, ge=0, le=1, description="learning rate of the scales, in parts of them; null: "
                                                               "0.024 / 2^bits")
    gains: float = Field(0.003, ge=0, le=1, description="learning rate of the norms' gains, in parts of their mean")

    def improve(self, visit: Visit, starts: list[Start], weights: list[Tensor] | None,
                run: Run) -> Iterator[tuple[Projection, Quantized]]:
        latents = [Held(start) for start in starts]
        gains = [Gain(norm) for norm in visit.block.norms.values() if norm.module.weight is not None]
        knobs = [knob for latent in latents for knob in self._knobs(latent)]
        knobs.append(Knobs([gain.delta for gain in gains], self.gains))
        losses = descend(BlockLoss(visit, latents, gains, weights), *split(len(visit.inputs)), knobs,
                         Course(self.steps, signs=False, seed=run.seed, late=self._late(visit, run)))
        for gain in gains if visit.wanted is not None else ():          # else the block is to stay as it is
            gain.write()
        yield from results(latents, losses)

    def _knobs(self, latent: Held) -> Iterator[Knobs]:
        """The offsets and the scales of a weight; the more codes there are, the less it takes to change one."""
        codes = 1 << latent.spec.bits
        yield Knobs([latent.offset], CODES / codes if self.codes is None else self.codes, REACH)
        yield Knobs([latent.factor], SCALES / codes if self.scales is None else self.scales)

    def _late(self, visit: Visit, run: Run) -> Callable[[], bool]:
        """True once this block has had its part of the minutes; the same in all processes."""
        if self.minutes is None:
            return lambda: False
        until = time.monotonic() + 60 * self.minutes / (run.layers or len(layer_list(visit.model)))
        return lambda: run.ranks.agree(time.monotonic() > until)


def split(count: int) -> tuple[list[int], list[int]]:
    """The batches to learn from, and those to judge by; few batches are both."""
    judged = list(range(0, count, HELD)) if count >= LEAST else list(range(count))
    return [index for index in range(count) if count < LEAST or index not in judged], judged


@register("quant.tune")
@dataclass(frozen=True)
class Tune(Tuning, Quantizer):
    """Scales, codes and norms' gains of a block, learned by Adam."""

    kind = "method"
