"""AutoRound: which way each weight of a block is rounded, learned by the sign of the slope of the block's error.

    c = clamp(round(w / s + V) + z),   s and z of the range times alpha and beta;   V in -1/2 .. 1/2
    V, alpha, beta <- minus rate (1 - step / iterations) sign(d loss / d .),   rate = 1 / iterations

The loss (block_loss.py) is of the block behind the edited ones, against what the dense model writes; the best state is
kept. Cheng et al., SignRound (arXiv:2309.05516), and the tool AutoRound, whose `enable_quanted_input` this is: inputs of
the edited stream, targets of the dense one. `start: gptq` begins at the codes of quant.gptq, w being where these and
the Hessian put it (start.py); `rtn` at the rounded weights, as the tool does. The state is judged on all batches some
ten times; the tool takes each batch's own loss for it. Left out: momentum, tuning of biases, float grids.
"""
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.block_loss import BlockLoss
from llmopt.quant.descent import Course, Knobs, descend
from llmopt.quant.grid import Spec
from llmopt.quant.gptq import ColumnSweep
from llmopt.quant.latent import Following, Gain, Held
from llmopt.quant.rtn import Nearest
from llmopt.quant.solver import Solver
from llmopt.quant.start import begin
from llmopt.quant.tokens import Alike, TokenWeights


class BlockSolver(Solver):
    """A solver that starts from the codes of single weights and goes on with the block as a whole."""

    inputs: ClassVar = "block"

    def quantize_block(self, visit, specs, run):
        starts = begin(visit, specs, run, self.begun())
        yield from self.improve(visit, starts, run)

    def begun(self):
        return ColumnSweep(tokens=self.tokens) if self.start == "gptq" else Nearest()

    @property
    def dense(self):
        return self.begun().dense


@register("autoround")
@dataclass(frozen=True)
class SignDescent(BlockSolver):
    iterations: int = Field(200, ge=0)
    rate: float | None = Field(None)
    start: Literal["gptq", "rtn"] = "gptq"
    tokens: TokenWeights = Field(Alike())

    def improve(self, visit, starts, run):
        latents = [Following(s) for s in starts]
        loss = BlockLoss(visit, latents, [], self.tokens.weights(visit, run))
        rate = self.rate or 1 / max(self.iterations, 1)
        knobs = [Knobs([l.offset for l in latents], rate, 0.5), Knobs([t for l in latents for t in (l.alpha, l.beta)], rate)]
        n = range(len(visit.inputs))
        first, last = descend(loss, n, n, knobs, Course(self.iterations, True, lambda share: 1 - share))
        for l in latents:
            made = l.result()
            made.figures |= {"block_error_before": first, "block_error": last}
            yield l.projection, made


@register("tune")
@dataclass(frozen=True)
class Tuning(BlockSolver):
    steps: int = Field(60, ge=0)
    start: Literal["gptq", "rtn"] = "gptq"
    tokens: TokenWeights = Field(Alike())
    scales: float = 3e-3
    gains: float = 2e-3
    codes: float = 0.0
    held: int = 8

    def improve(self, visit, starts, run):
        latents = [Held(s) for s in starts]
        gains = [Gain(n) for n in visit.block.norms.values() if n.module.weight is not None]
        loss = BlockLoss(visit, latents, gains, self.tokens.weights(visit, run))
        knobs = [Knobs([l.offset for l in latents], self.codes, 0.45), Knobs([l.factor for l in latents], self.scales),
                 Knobs([g.delta for g in gains], self.gains)]
        n = list(range(len(visit.inputs)))
        judged = n[::self.held] if self.held and len(n) > 1 else n
        learned = [i for i in n if i not in judged] if self.held and len(n) > 1 else n
        first, last = descend(loss, learned, judged, knobs, Course(self.steps, False, lambda share: 0.5 + 0.5 * math.cos(math.pi * share)))
        for g in gains:
            g.write()
        for l in latents:
            made = l.result()
            made.figures |= {"block_error_before": first, "block_error": last}
            yield l.projection, made


@register("quant.autoround")
@dataclass(frozen=True)
class AutoRound(SignDescent, Quantizer):
    kind = "method"


@register("quant.tune")
@dataclass(frozen=True)
class Tune(Tuning, Quantizer):
    kind = "method"
