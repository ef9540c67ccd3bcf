"""Tuning: scales, codes and the norms' gains of a block learned by Adam, from the codes of a closed form.

    c = clamp(round(u + V)),   s = s_0 (1 + a),   gain = g_0 + mean|g_0| d            V, a, d = 0 at the beginning
    V, a, d <- Adam on the slope of the block's error, rates falling by half a cosine;   V in -0.45 .. 0.45

u is where the best place of a weight lies, all others of its row as they are (start.py): a code goes to its neighbour
where the block gains by it. The slope passes straight through roundings (Bengio et al., arXiv:1308.3432), scales are
signed and of the stored type in every step. The loss is AutoRound's (block_loss.py: behind the edited blocks, against
what the dense model writes). Every eighth batch of the data is held out where there are four at least, and the state
that does best on those is kept, the first one included. Gains stay ordinary weights of the checkpoint. OmniQuant
(arXiv:2308.13137) and EfficientQAT (arXiv:2407.11062) tune block by block as well.

objective: logits goes on from there with all blocks at once, as many again, by the KL of the next-token
probabilities to the dense model's (logits_loss.py): codes from the middle of their places, V in -0.75 .. 0.75. It needs
the whole model, its gradients' activations too, in memory.

It is a solver, and no step of its own after quantization: the walk that hands blocks to solvers has the dense model's
stream, the commits of finished blocks and the resuming already, and one step leaves one record. Left out: biases, the
final norm, zero points; with logits, what a token counts.
"""
import time
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.descent import Course, Knobs, descend, split
from llmopt.calibration.logits_loss import LogitsLoss, outputs
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection, layer_list
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.block_loss import BlockLoss
from llmopt.quant.block_solver import BlockSolver
from llmopt.quant.grid import Spec
from llmopt.quant.latent import Gain, Held, results, substitutes
from llmopt.quant.start import Start
from llmopt.quant.together import learned, put

REACH, FAR = 0.45, 0.75         # steps of the grid: how far a weight may go from its best place, and from its code
CODES, SCALES = 0.12, 0.024     # learning rates, times the number of codes


@register("tune")
@dataclass(frozen=True)
class Tuning(BlockSolver):
    """Scales, codes and norms' gains of a block, learned by Adam."""

    iterations: int = Field(60, ge=0, description="steps for each block, a batch of the data each")
    objective: Literal["block", "logits"] = Field("block", description="block: each by the dense one's output; logits: "
                                                  "then all together, by the dense model's predictions")
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
        gains = [Gain(norm) for norm in visit.block.norms.values() if norm.weight is not None]
        parts = (run.layers or len(layer_list(visit.model))) * (2 if self.whole else 1)
        losses = descend(BlockLoss(visit, latents, gains, weights), *split(len(visit.inputs)),
                         self._knobs(latents, gains, REACH), self._course(run, parts))
        for gain in gains if visit.wanted is not None else ():          # else the block is to stay as it is
            gain.write()
        yield from results(latents, losses)

    @property
    def whole(self) -> bool:
        return self.objective == "logits"

    def prepare(self, model: nn.Module, run: Run) -> list[Tensor]:
        return outputs(model, run.batches)

    def finish(self, model: nn.Module, specs: Mapping[str, Spec], run: Run, prepared: list[Tensor]) -> None:
        def learn(latents: list[Held], gains: list[Gain]) -> tuple[float, float]:
            loss = LogitsLoss(model, run.batches, prepared, lambda: substitutes(latents, gains))
            return descend(loss, *split(len(run.batches)), self._knobs(latents, gains, FAR), self._course(run, 2))

        for _ in run.progress([0], "all blocks together"):
            found = run.memory.keep_named("tuned", lambda: learned(model, specs, learn))
        put(model, specs, run, found, "tuned blocks")

    def _knobs(self, latents: list[Held], gains: list[Gain], reach: float) -> list[Knobs]:
        """What moves how fast; the more codes a grid has, the less it takes to change one."""
        found = [Knobs([gain.delta for gain in gains], self.gains)]
        for latent in latents:
            count = 1 << latent.spec.bits
            found += [Knobs([latent.offset], CODES / count if self.codes is None else self.codes, reach),
                      Knobs([latent.factor], SCALES / count if self.scales is None else self.scales)]
        return found

    def _course(self, run: Run, parts: int) -> Course:
        """All steps, or as many as one of so many parts of the minutes has room for: the same in all processes."""
        until = None if self.minutes is None else time.monotonic() + 60 * self.minutes / parts
        return Course(self.iterations, signs=False, seed=run.seed,
                      late=lambda: until is not None and run.ranks.agree(time.monotonic() > until))


@register("quant.tune")
@dataclass(frozen=True)
class Tune(Tuning, Quantizer):
    """Scales, codes and norms' gains of a block, learned by Adam."""

    kind = "method"
