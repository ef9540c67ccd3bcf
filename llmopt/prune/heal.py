"""Healing: what the steps before have left of a model learns to predict what the dense model predicts.

    loss = mean_t KL(dense || model) + hidden * sum_t |h_t - dense h_t|^2 / sum_t |dense h_t|^2

by Adam, the rate falling by half a cosine, over the calibration data (Hinton et al., arXiv:1503.02531; after pruning:
Muralidharan et al., Minitron, arXiv:2407.14679). h is what the decoder gives behind its last norm. That of the dense
model is kept from before the first step: the head is the same before and after, so that it stands for all logits. What
learns are the parameters of the blocks: all of them, the writers and norms, or norms and products of low rank on every
weight (LoRA; Hu et al., arXiv:2106.09685), which are folded into the weights. Every eighth batch is held out, and the
state that does best on those is kept, the first one included.

`minutes` are by the clock: two steps are timed, and as many are taken as there is time for, at most `epochs`. A run
that was cut off goes on behind the last of ten stops. The whole model is in memory, as gradients go through all of it:
beside it what learns five times, in float32 (numbers, slopes, two moments, the best state): with low_rank that is a
ninth of `all` in SmolLM2-135M. Left out: labels (the dense model's predictions say more), data of other kinds than the
calibration data, hidden states between the blocks.
"""
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.descent import Knobs, split
from llmopt.calibration.learning import learn
from llmopt.calibration.logits_loss import LogitsLoss, outputs
from llmopt.calibration.walk import each
from llmopt.errors import LlmoptError
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Block, blocks
from llmopt.parts import register
from llmopt.prune.learned import Learned, LowRank, Whole

RATES = {"all": 2e-4, "writers": 3e-4, "low_rank": 1e-3}
STATE = "healing"               # the name under which the state is kept


@register("prune.heal")
@dataclass(frozen=True)
class Heal(Method):
    """A pruned model learns to predict what the dense one predicts."""

    stage: ClassVar = "prune"
    needs_data: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    recalls: ClassVar[bool] = True

    train: Literal["all", "writers", "low_rank"] = Field("all", description="what learns: all parameters of the "
                                                         "blocks, their writers and norms, or norms and low-rank "
                                                         "changes of all weights")
    rank: int = Field(32, ge=1, description="of the changes (train: low_rank)")
    epochs: float = Field(5, gt=0, description="how often each batch is learned from, at most")
    minutes: float | None = Field(30, gt=0, description="by the clock; null: as long as the epochs take")
    rate: float | None = Field(None, gt=0, description="learning rate; null: 2e-4 for all, 3e-4 for writers, 1e-3 for "
                                                       "low_rank")
    hidden: float = Field(0, ge=0, description="weight of the decoder's output beside that of the predictions")

    def backward(self, rows: int, length: int) -> int:
        return rows * length

    def learned_numbers(self, model: nn.Module) -> int:
        return sum(self._count(block) for block in blocks(model))

    def apply(self, model: nn.Module, run: Run) -> Record:
        if not run.batches:
            raise LlmoptError("this step needs calibration data and there is none")
        found = run.memory.keep_named("healed", lambda: self._learned(model, run))
        before, after, steps = found.pop("figures").tolist()
        with torch.no_grad():
            for block in each(model, run, "healed blocks"):
                for name, parameter in block.module.named_parameters():
                    if (key := f"{block.name}.{name}") in found:
                        parameter.copy_(found[key])
        return Record(meta={"steps": int(steps), "loss_before": before, "loss": after})

    def _learned(self, model: nn.Module, run: Run) -> dict[str, Tensor]:
        """By name, the parameters that have learned; "figures": losses on what was held out before and after, steps."""
        if run.dense is None and run.layers is None:
            raise LlmoptError("what the dense model predicts is not known; give this step and the "
                              "pruning before it in one run")
        dense = run.dense if run.layers is None else outputs(model, run.batches)        # a rehearsal has but one block
        drawing = torch.Generator().manual_seed(run.seed)
        parts = [part for block in blocks(model) for part in self._parts(block, drawing)]
        loss = LogitsLoss(model, run.batches, dense, lambda: {part.key: part.value() for part in parts}, self.hidden)
        knobs = [Knobs([number for part in parts for number in part.numbers], self.rate or RATES[self.train])]
        first, last, steps = learn(run, STATE, loss, knobs, self.epochs, self.minutes)
        _, judged = split(len(run.batches))
        share = loss.tokens / sum(int(run.batches[index]["attention_mask"].sum()) for index in judged)
        with torch.no_grad():
            made = {part.key: part.value().detach().contiguous() for part in parts}
        for tensor in made.values():
            run.ranks.broadcast_(tensor)
        return made | {"figures": torch.tensor([first * share, last * share, steps], dtype=torch.float64)}

    def _parts(self, block: Block, drawing: torch.Generator) -> Iterator[Learned]:
        """What learns of a block."""
        writers = {writer.path for writer in (block.attn_out, block.ffn_out) if writer is not None}
        norms = {norm.name for norm in block.norms.values()}
        for name, parameter in block.module.named_parameters():
            key = f"{block.name}.{name}"
            owner = key.rpartition(".")[0]
            if self.train == "all" or owner in norms or self.train == "writers" and owner in writers:
                yield Whole(key, parameter)
        if self.train == "low_rank":
            yield from (LowRank(projection, self.rank, drawing) for projection in block.projections())

    def _count(self, block: Block) -> int:
        """How many numbers of a block learn, at least."""
        if self.train == "low_rank":
            return sum(self.rank * (p.in_features + p.out_features) for p in block.projections())
        writers = [writer for writer in (block.attn_out, block.ffn_out) if writer is not None]
        return sum(p.numel() for p in block.module.parameters()) if self.train == "all" else \
            sum(writer.in_features * writer.out_features for writer in writers)
