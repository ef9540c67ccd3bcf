"""Depth pruning: whole blocks leave, or attentions and FFNs, those first that the model misses least.

    score of a part / its parameters, the least first; measured anew after every one that leaves   (`iterative`)

damage   KL of the predictions to the dense ones without the part, less that before it left. The only score of the four
         that is about predictions; a pass through all blocks behind it for each part.
mi       macro influence (FuseGPT; Pei et al., arXiv:2411.14507): the same by the direction of the last hidden state.
bi       block influence (ShortGPT; Men et al., arXiv:2403.03853): how far a part turns the stream; one pass. Of an
         attention or FFN: from before it to behind it (He et al., arXiv:2406.15786).
angular  a run of n blocks at once, that across which the last tokens of the rows turn least (Gromov et al.,
         arXiv:2403.17887); n by `ratio`.

Damages do not add up (in SmolLM2-135M attention 17 and FFNs 14 and 12, the least one by one, cost .216 nats together,
as much as three whole blocks chosen in turn), hence `iterative`. With `repair` the writer in front of each gap is then
fitted to do the work of what has left (repair.py); choices are made without it. Left out: training after the cut, which
is `prune.heal`'s, and LaCo's merging of neighbours, which `prune.fuse` learns instead.
"""
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.errors import BudgetError, FieldError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.parts import Several, register
from llmopt.prune.base import Unit
from llmopt.prune.influence import Score, angular, bi, left_out
from llmopt.prune.leaving import Leaving, Part, Parts, plan_of
from llmopt.prune.repair import repair


@register("prune.depth")
@dataclass(frozen=True)
class Depth(Leaving):
    """Blocks, or attentions and FFNs, that the model misses least."""

    units: Several[Unit] = Field(("blocks",), description="[blocks], or some of [attention, mlp]")
    score: Score = Field("damage", description="what tells how much a part is missed: KL without it, how far the last "
                                               "hidden state turns without it, how far it turns the stream, or that "
                                               "of a run of blocks")
    iterative: bool = Field(True, description="measure anew after every part that leaves; angular takes all at once")
    repair: bool = Field(True, description="the writer in front of a gap takes over, by least squares, what was "
                                           "written there")

    def check(self) -> None:
        chosen = set(self.units)
        if len(chosen) < len(self.units) or chosen != {"blocks"} and (not chosen or not chosen <= {"attention", "mlp"}):
            raise FieldError("units", list(self.units), "[blocks], or some of [attention, mlp], each once")
        if self.score == "angular" and chosen != {"blocks"}:
            raise FieldError("score", "angular", "damage, mi or bi for attentions and FFNs; angular is of whole blocks")

    def take_out(self, model: nn.Module, run: Run) -> tuple[list[Part], dict[str, Any]]:
        views, rounds = blocks(model), []

        def choose(gone: list[Part], fits: Parts) -> list[Part]:
            told = run.memory.remember(f"round {len(rounds)}", lambda: run.ranks.agree(
                self._round(model, run, gone, fits)))
            rounds.append(told["scores"])
            return [tuple(part) for part in told["leave"]]

        gone = self.in_turn(views, choose)
        plan = plan_of(views, gone)
        found = {"repair": repair(model, run, plan, f"{self.name} repair")} if self.repair else {}
        return gone, {"rounds": rounds, **found}

    def _round(self, model: nn.Module, run: Run, gone: list[Part], fits: Parts) -> dict[str, Any]:
        """The scores of the parts [[block, kind, score], ...] (of angular: of the first of a run), and who leaves."""
        if self.score == "angular":
            count = len(self.in_turn(blocks(model), lambda gone, fits: [next(iter(fits))]))
            indices = {index for index, _ in fits}
            starts = [i for i in sorted(indices) if indices.issuperset(range(i, i + count))]
            if not starts:
                raise BudgetError(f"there is no run of {count} blocks that may leave; lower ratio {self.ratio:g}")
            found = {(start, "blocks"): value for start, value in angular(model, run, starts, count).items()}
            first = min(found, key=found.get)[0]
            leave = [(index, "blocks") for index in range(first, first + count)]
        else:
            found = bi(model, run, gone, list(fits)) if self.score == "bi" else \
                left_out(model, run, gone, list(fits), self.score, self.trial_tokens)
            order = sorted(found, key=lambda part: found[part] / fits[part])
            leave = order[:1] if self.iterative else self._fitting(model, order)
        return {"scores": [[*part, value] for part, value in found.items()], "leave": [list(part) for part in leave]}

    def _fitting(self, model: nn.Module, order: list[Part]) -> list[Part]:
        """Of parts in this order, those that may leave together."""
        return self.in_turn(blocks(model), lambda gone, fits: [next(part for part in order if part in fits)])
