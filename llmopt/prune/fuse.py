"""FuseGPT: a block leaves, and its neighbours learn to use its weights (Pei et al., arXiv:2411.14507).

    W_j' = W_j + B_j A_j + (C_j D_j) (.) W_i      b_j' = b_j + f_j (.) b_i      (.) elementwise; j around the block i

Which block leaves is told by macro influence, measured anew after each fusion: MI_i = 1 - mean_t cos(last hidden
state, the same without block i). Its group are the `group` blocks around it, itself included. W_j and W_i stay as they
are; C D (of some rank; rate 1e-3), B A and the gains and biases of the norms learn to make up for it, on what the group
reads in the model as it is now:

    logits          how far the model's predictions are from those before the first block left
    relative, kl    how far the group's output is from that before this block left, as in the paper (group_loss.py)

C, B and f begin at 0: the first state is the block gone, and with `repair` the writer in front of it repaired in closed
form (repair.py), on the batches that are learned from. Adam (.9, .95), the rate falling by
half a cosine after a twentieth of the steps in which it rises. Every eighth batch is held out, and the state that does
best on those is kept. Then all is folded into plain weights, so that a block that leaves later takes along what it was
given, and the checkpoint is that of a smaller stock model. Blocks of another kind (attention of another window, other
shapes) learn B A, biases and norms alone. Other than the paper: predictions are the default, as the group's output
gains little or nothing on llmopt/reference; the number of blocks is rounded down, the first and the last are protected,
and every fusion is folded at once.

Streamed, the blocks of one group are in memory together, and with logits all behind it. Each of several processes does
all of the work.
"""
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.calls import record_calls
from llmopt.calibration.descent import Knobs, split
from llmopt.calibration.learning import learn
from llmopt.calibration.walk import Visit, each
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks, layer_list
from llmopt.parts import register
from llmopt.prune.group_loss import GroupLoss, PredictionLoss
from llmopt.prune.influence import left_out
from llmopt.prune.learned import Learned, LowRank, Whole, factors
from llmopt.prune.leaving import Leaving, Part, Parts
from llmopt.prune.repair import repaired, writer_of
from llmopt.scale.processes import Ranks

PAPER, RATES = 9.65e-6, {"logits": 1e-3}
LISTS = 8           # of activations held at once: what a group reads and writes, the aims, four on the way, the masks


@register("prune.fuse")
@dataclass(frozen=True)
class Fuse(Leaving):
    """Blocks leave one by one, and their neighbours learn to use their weights."""

    level: ClassVar = "structure"

    group: int = Field(8, ge=2, description="blocks around the one that leaves, itself included")
    rank: int = Field(128, ge=1, description="of the factors C D and B A")
    epochs: float = Field(20, gt=0, description="how often each batch is learned from, at most")
    minutes: float | None = Field(None, gt=0, description="by the clock, for each block that leaves; null: as long as "
                                                          "the epochs take")
    loss: Literal["relative", "kl", "logits"] = Field("logits", description="how far the model's predictions are "
        "from those before the first block left; or the group's output, by squares, or by softmax over the features")
    coefficients: float = Field(1e-3, gt=0, description="learning rate of C, D and f")
    repair: bool = Field(True, description="the writer in front of a gap begins where prune.depth ends: at the least "
                                           "squares that stand in for the block")
    rate: float | None = Field(None, ge=0, description="learning rate of A, B and the norms; null: 1e-3 with logits, "
                                                       "else the paper's 9.65e-6")

    def take_out(self, model: nn.Module, run: Run) -> tuple[list[Part], dict[str, Any]]:
        rounds: list[list] = []
        fusions: list[dict[str, Any]] = []
        aims = self._written(model, run) if self.loss == "logits" else None

        def choose(gone: list[Part], fits: Parts) -> list[Part]:
            found = run.memory.remember(f"round {len(rounds)}", lambda: run.ranks.agree({"scores": [
                [*part, value] for part, value in
                left_out(model, run, gone, list(fits), "mi", self.trial_tokens).items()]}))["scores"]
            index = min(found, key=lambda told: told[2])[0]
            fusions.append(self._fuse(model, run, [lost for lost, _ in gone], index, aims))
            rounds.append(found)
            return [(index, "blocks")]

        gone = self.in_turn(blocks(model), choose)
        return gone, {"rounds": rounds, "fusions": fusions}

    def _written(self, model: nn.Module, run: Run) -> list[Tensor]:                     # [B, T, E] each
        """What the last block writes while all are there."""
        memory = run.memory.reading.holding(LISTS)
        hidden, calls = record_calls(model, run.batches, memory)
        masks = [batch["attention_mask"].bool() for batch in run.batches]
        for block in blocks(model):
            with memory.block(model, block.index):
                hidden = memory.keep(Visit(model, block, hidden, calls[block.index], masks).outputs())
        return hidden

    def _fuse(self, model: nn.Module, run: Run, gone: list[int], index: int,
              aims: list[Tensor] | None) -> dict[str, Any]:
        """Ready the group around a block for going without it; figures for the record."""
        here = window([i for i in range(len(layer_list(model))) if i not in gone], index, self.group)
        found = run.memory.keep_named(f"fused {index}", lambda: self._learned(model, run, gone, here, index, aims))
        bare, repaired, after, steps = found.pop("figures").tolist()
        with torch.no_grad():
            for block in each(model, run, f"fusing block {index}", only=[i for i in here if i != index]):
                for name, parameter in block.module.named_parameters():
                    if (key := f"{block.name}.{name}") in found:
                        parameter.copy_(found[key])
        return {"block": index, "group": here, "steps": int(steps), "error_before": bare, "error_repaired": repaired,
                "error": after}

    def _learned(self, model: nn.Module, run: Run, gone: list[int], here: list[int], index: int,
                 aims: list[Tensor] | None) -> dict[str, Tensor]:
        """By name, the parameters of the group as they are to be; "figures": errors before and after, steps.

        aims: what the last block is to write for each batch; None: the group what it writes with the block.
        """
        memory, drawing = run.memory.reading.holding(LISTS), torch.Generator().manual_seed(run.seed)
        hidden, calls = record_calls(model, run.batches, memory)
        masks = [batch["attention_mask"].bool() for batch in run.batches]
        learned, judged = split(len(masks))

        def visit(inner: int, inputs: list[Tensor]) -> Visit:
            return Visit(model, blocks(model)[inner], inputs, calls[inner], masks)

        for inner in (i for i in range(here[0]) if i not in gone):
            with memory.block(model, inner):
                hidden = memory.keep(visit(inner, hidden).outputs())
        tail = [i for i in range(here[-1] + 1, len(layer_list(model))) if i not in gone and aims is not None]
        with ExitStack() as stack:
            for inner in [*here, *tail]:
                stack.enter_context(memory.block(model, inner))
            wanted, before, behind = hidden, None, None
            for inner in here if aims is None else here[:here.index(index) + 1]:
                before = visit(inner, wanted) if inner < index else before
                wanted = memory.keep(visit(inner, wanted).outputs())
                behind = wanted if inner == index else behind
            leaving, views = blocks(model)[index], [blocks(model)[inner] for inner in here if inner != index]
            slow = [part for block in views for part in _parts(model, block, leaving, self.rank, drawing)]
            fast = [number for part in slow if isinstance(part, Fused) for number in part.coefficients]
            rate = RATES.get(self.loss, PAPER) if self.rate is None else self.rate
            knobs = [Knobs(fast, self.coefficients), Knobs([n for part in slow for n in part.numbers], rate)]
            visits = [visit(inner, hidden) for inner in [*here, *tail] if inner != index]
            if aims is None:
                loss = GroupLoss(visits, wanted, slow, self.loss)
            else:
                stack.enter_context(memory.outside(model, head=True))
                loss = PredictionLoss(visits, aims, slow, run.batches)
            with torch.no_grad():
                bare = sum(float(loss(i)) for i in judged)
                if self.repair and before is not None:
                    _repair(before, behind, learned, slow)
            first, last, steps = learn(run, f"fusing {index}", loss, knobs, self.epochs, self.minutes)
            with torch.no_grad():
                made = {part.key: part.value().detach().contiguous() for part in slow}
        for tensor in made.values():
            run.ranks.broadcast_(tensor)
        share = loss.tokens / sum(int(masks[i].sum()) for i in judged)
        return made | {"figures": torch.tensor([bare * share, first * share, last * share, steps], dtype=torch.float64)}


def _repair(front: Visit, behind: list[Tensor], learned: list[int], parts: list[Learned]) -> None:
    """Let the last writer of the block in front of a gap begin as what stands in for the block that leaves best.

    behind: what the stream was behind that block. learned: the batches to fit to.
    """
    inputs, calls, masks, wanted = ([of[i] for i in learned] for of in (front.inputs, front.calls, front.masks, behind))
    writer = writer_of(front.block)
    weight, bias, _ = repaired(replace(front, inputs=inputs, calls=calls, masks=masks, wanted=wanted), writer, Ranks())
    made = {} if weight is None else {writer.key: weight, f"{writer.path}.bias": bias}
    for part in parts:
        if part.key in made:
            part.begin(made[part.key])


class Fused(LowRank):
    """W + B A + (C D) (.) R, R the weight [out, in] of the block that leaves."""

    def __init__(self, projection: Projection, removed: Projection, rank: int, drawing: torch.Generator):
        super().__init__(projection, rank, drawing)
        self.removed = removed.weight.float()
        self.coefficients = list(factors(self.weight, rank, drawing))

    def value(self) -> Tensor:
        left, right = self.coefficients
        return self.placed(self.weight.float() + self.up @ self.down + (left @ right) * self.removed)


class FusedBias(Fused):
    """b + f (.) r, r the bias of the block that leaves."""

    def __init__(self, projection: Projection, removed: Projection):
        self.key, self.parameter, self.bias = f"{projection.path}.bias", projection.module.bias, projection.bias.float()
        self.removed, self.coefficients = removed.bias.float(), [torch.zeros_like(removed.bias, dtype=torch.float32)]

    @property
    def numbers(self) -> list[Tensor]:
        return []

    def begin(self, bias: Tensor) -> None:
        self.bias = bias.float()

    def value(self) -> Tensor:
        return (self.bias + self.coefficients[0] * self.removed).to(self.parameter.dtype)


def window(alive: list[int], index: int, size: int) -> list[int]:
    """The `size` consecutive blocks of those that are left around one of them, moved inwards at the ends."""
    start = min(max(0, alive.index(index) - size // 2), max(0, len(alive) - size))
    return alive[start:start + size]


def _parts(model: nn.Module, block: Block, leaving: Block, rank: int, drawing: torch.Generator) -> Iterator[Learned]:
    """What learns of a block."""
    alike = _kind(model, block) == _kind(model, leaving)
    for projection, removed in zip(block.projections(), leaving.projections() if alike else block.projections(),
                                   strict=True):
        yield Fused(projection, removed, rank, drawing) if alike else LowRank(projection, rank, drawing)
        if projection.bias is not None:
            key = f"{projection.path}.bias"
            yield FusedBias(projection, removed) if alike else Whole(key, projection.module.bias)
    for norm in block.norms.values():
        for name, parameter in norm.module.named_parameters():
            yield Whole(f"{norm.name}.{name}", parameter)


def _kind(model: nn.Module, block: Block) -> tuple:
    """What two blocks must have in common for the weights of one to be of use in the other."""
    types = model.config.to_dict().get("layer_types")
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.module.named_parameters()]
    return types[block.index] if types else None, block.form, shapes
