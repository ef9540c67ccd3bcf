"""The candidates of a search: some widths for each part of each block, locally pruned, their writers refitted.

A candidate is the list of units that stay and the writer's columns on them, not a copy of a block. The candidates of a
part come from one ranking of its units. Blocks are gone through in order; what a block reads has errors in it already:

    X = sum_e (1 - S_e) X_e / sum_e (1 - S_e)      S_e: share that candidate e of the part in front takes away

As writers are linear, that is what the weighted mean of the candidates' weights gives. Or X is what one candidate of
each part, the centre, gives. Li et al., 2025 (arXiv:2503.09657). An FFN reads behind its own block's edited attention.
Left out: a ridge of its own for each candidate; the one that is best on rows held out for the middle candidate, or the
cut alone where none is, serves all of a part.
"""
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmopt.calibration.calls import record_calls
from llmopt.calibration.walk import Visit
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks, layer_list
from llmopt.model.finite import all_finite
from llmopt.prune.allocate import Units, survivors
from llmopt.prune.refit import Sums, chosen, held_out, placed, solve, with_bias
from llmopt.prune.search import Space
from llmopt.prune.surgery import LayerPlan, head_columns

PARTS = ("attention", "mlp")
Rank = Callable[[Block, Projection, str, Tensor], Units]    # a writer and its H [in, in], the kind of its units
Made = dict[str, Tensor]        # of a block, by "PART.TAKEN.units": [n] that stay; "PART.TAKEN.columns": [out, P (+ 1)]
Written = tuple[Tensor, Tensor | None]                      # weight [out, in] and bias of a writer


class Option(NamedTuple):
    """What a block may become: units taken from attention and FFN, all of them where the part is gone.

    drop: the whole block is gone.
    """

    attention: int
    mlp: int
    drop: bool = False


@dataclass(frozen=True)
class Part:
    """Attention or FFN of one block.

    units: as in allocate, whatever their scores; None: all of it leaves or nothing. count: of units. whole: parameters
    of the part. levels: numbers of units that its candidates take away, ascending from 0.
    """

    units: Units | None
    count: int
    whole: int
    levels: tuple[int, ...] = (0,)

    def price(self, taken: int) -> int:
        """Parameters that leave with so many units."""
        return 0 if not taken else self.whole if taken == self.count else taken * self.units.cost

    def gone(self, taken: int) -> bool:
        """True if nothing is left."""
        return taken == self.count > 0

    @property
    def thinned(self) -> list[int]:
        """The levels of candidates that keep some units and not all."""
        return [taken for taken in self.levels if 0 < taken < self.count]


def widths(part: Part, centre: int, step: float, around: int, gone: bool) -> tuple[int, ...]:
    """The levels of a part: nothing, the centre, `around` steps to both sides of it, and all where it may be gone.

    step: in units, at least one; stretched so that a whole number of steps leads from the centre to 0, where it is not
    longer than that. A level is rounded to what the part may keep.
    """
    found = {0, centre} | ({part.count} if gone else set())
    if part.units is not None:
        step = max(step, 1.0)
        step = centre / whole if (whole := round(centre / step)) else step
        possible = [part.count - kept for kept in part.units.allowed]
        wanted = (centre + k * step for k in range(-around, around + 1))
        found |= {min(possible, key=lambda taken, w=w: (abs(taken - w), taken)) for w in wanted}
    return tuple(sorted(found))


def options(own: dict[str, Part], drop: bool) -> list[Option]:
    """The options of a block, first the one that takes nothing: pairs of levels that leave something, and `drop`."""
    pairs = [Option(a, m) for a, m in product(own["attention"].levels, own["mlp"].levels)
             if not all(part.gone(taken) or not part.count for part, taken in zip(own.values(), (a, m), strict=True))
             or a == m == 0]
    return pairs + ([Option(own["attention"].count, own["mlp"].count, True)] if drop else [])


def space(parts: list[dict[str, Part]], choices: list[list[Option]], whole: list[int],
          budget: tuple[int, ...]) -> Space:
    """The search space; whole: parameters that leave with each block; budget: one account, or one for each part."""
    def price(own: dict[str, Part], option: Option, block: int) -> tuple[int, ...]:
        each = own["attention"].price(option.attention), own["mlp"].price(option.mlp)
        return each if len(budget) == 2 else (block if option.drop else sum(each),)

    return Space(
        [[price(own, option, block) for option in of] for own, of, block in zip(parts, choices, whole, strict=True)],
        [[tuple(to for to, other in enumerate(of) if apart(own, option, other)) for option in of]
         for own, of in zip(parts, choices, strict=True)],
        [[not option.drop and option.attention < own["attention"].count for option in of]
         for own, of in zip(parts, choices, strict=True)], budget)


def apart(own: dict[str, Part], one: Option, other: Option) -> bool:
    """True for options one step apart: the next level of a part, a part or a block whole or gone, the last part too."""
    if one.drop or other.drop:
        stays = other if one.drop else one
        last = any(part.gone(taken) for part, taken in zip(own.values(), stays, strict=False))
        return one.drop != other.drop and (last or (stays.attention, stays.mlp) == (0, 0))
    differ = [(own[name], *sorted((a, b))) for name, a, b in zip(PARTS, one, other, strict=False) if a != b]
    if len(differ) != 1:
        return False
    part, low, high = differ[0]
    return part.levels.index(high) - part.levels.index(low) == 1 or (low == 0 and part.gone(high))


@dataclass(frozen=True)
class Supernet:
    """All candidates of a model: parts, options and tensors of each block."""

    parts: list[dict[str, Part]]
    choices: list[list[Option]]
    made: list[Made]

    def weights(self, block: Block, choice: Hashable) -> dict[str, Tensor] | None:
        """What an option has in place of a block's parameters, by their names in it; None for a block that is gone."""
        option, own = self.choices[block.index][choice], self.parts[block.index]
        if option.drop:
            return None
        return {name: tensor for which, taken in zip(PARTS, option, strict=False) if taken for name, tensor in
                in_place(block, which, written(block, which, own[which], taken, self.made[block.index])).items()}

    def layer_plan(self, index: int, choice: int) -> LayerPlan:
        """What stays of a block under an option."""
        option, own, kept = self.choices[index][choice], self.parts[index], {}
        if option.drop:
            return LayerPlan(drop=True)
        for which, taken in zip(PARTS, option, strict=False):
            if taken and not own[which].gone(taken):
                kind = own[which].units.kind
                kept["heads" if kind == "q_heads" else kind] = self.made[index][f"{which}.{taken}.units"]
        return LayerPlan(**kept, skip=tuple(which for which, taken in zip(PARTS, option, strict=False)
                                            if own[which].gone(taken)))


@dataclass(frozen=True)
class Making:
    """How candidates are made: `rank` compares the units of a writer; refit: False for the cut alone.

    centre: by block the option that the next block reads behind; None: the mean of all candidates.
    """

    rank: Rank
    refit: bool
    centre: list[Option] | None = None

    @torch.no_grad()
    def net(self, model: nn.Module, run: Run, parts: list[dict[str, Part]], choices: list[list[Option]],
            name: str) -> Supernet:
        """The candidates of all blocks, from one walk through the calibration data; no block is changed."""
        return Supernet(parts, choices, list(self._blocks(model, run, parts, name)))

    def _blocks(self, model: nn.Module, run: Run, parts: list[dict[str, Part]], name: str) -> Iterator[Made]:
        memory = run.memory.reading
        hidden, calls = record_calls(model, run.own_batches, memory)
        masks = [batch["attention_mask"].bool() for batch in run.own_batches]
        for index in run.progress(range(len(layer_list(model))), name):
            with memory.block(model, index):
                visit, made = Visit(model, blocks(model)[index], hidden, calls[index], masks), {}
                for which, part in parts[index].items():
                    if part.thinned:
                        ahead = self._passed(visit.block, parts[index], made, PARTS[:PARTS.index(which)]) or {}
                        made |= run.memory.keep_named(
                            f"{name} {index} {which}",
                            lambda v=visit, w=which, p=part, a=ahead: self._candidates(v, w, p, a, run))
                weights = self._passed(visit.block, parts[index], made, PARTS)
                if weights is not None:
                    hidden = memory.keep(visit.forward(i, weights or None) for i in range(len(hidden)))
            yield made

    def _passed(self, block: Block, own: dict[str, Part], made: Made, which: Iterable[str]) -> dict[str, Tensor] | None:
        """What stands in place of the block's parameters for those behind it, None: the block does not."""
        centre = self.centre[block.index] if self.centre else None
        if centre and centre.drop:
            return None
        found = {}
        for name in which:
            levels = own[name].levels if centre is None else (centre[PARTS.index(name)],)
            if levels != (0,):
                found |= in_place(block, name, mean(block, name, own[name], levels, made))
        return found

    def _candidates(self, visit: Visit, which: str, part: Part, ahead: dict[str, Tensor], run: Run) -> Made:
        block, writer = visit.block, writer_of(visit.block, which)
        sums = Sums(held_out(visit.masks, run.ranks), run.ranks, int(writer.bias is not None))
        visit.observe({writer.name: sums.add}, weights=ahead or None)
        old = with_bias(writer)
        sums.gram.join(old)
        if not sums.gram.tokens:
            raise LlmoptError(f"{writer.name}: no calibration token reached it")
        hessian, found = sums.all(old), {}
        if not all_finite(hessian):
            raise LlmoptError(f"{writer.name}: its units cannot be compared, as what it reads on the calibration data "
                              "is not finite")
        units = self.rank(block, writer, part.units.kind, hessian[:writer.in_features, :writer.in_features])
        kept = {taken: survivors(units, taken) for taken in part.thinned}
        inputs = {taken: torch.cat([inputs_of(block, units.kind, of).to(old.device), torch.arange(
            writer.in_features, old.shape[1], device=old.device)]) for taken, of in kept.items()}
        ridge = chosen(old, inputs[part.thinned[len(part.thinned) // 2]], sums)[0] if self.refit else None
        for taken, of in inputs.items():
            columns = old[:, of] if ridge is None else solve(old, hessian, of, ridge)
            columns = run.ranks.broadcast_(columns.to(writer.weight.dtype).contiguous())
            if not all_finite(columns):
                raise LlmoptError(f"{writer.name}: its refit is not finite")
            found |= {f"{which}.{taken}.units": kept[taken], f"{which}.{taken}.columns": columns}
        return found


def writer_of(block: Block, which: str) -> Projection:
    """The writer of a part."""
    return block.attn_out if which == "attention" else block.ffn_out


def inputs_of(block: Block, kind: str, units: Tensor) -> Tensor:
    """The writer's input columns that belong to units (of q_heads: to these heads)."""
    if kind == "ffn":
        return units
    if kind == "kv_groups":
        units = torch.arange(block.heads).view(block.kv_heads, -1)[units].flatten()
    return head_columns(units, block.head_dim)


def written(block: Block, which: str, part: Part, taken: int, made: Made) -> Written:
    """A part's writer when so many units are taken; of what is gone, zeros."""
    writer = writer_of(block, which)
    if not taken:
        return writer.weight, writer.bias
    if part.gone(taken):
        return torch.zeros_like(writer.weight), None if writer.bias is None else torch.zeros_like(writer.bias)
    inputs = inputs_of(block, part.units.kind, made[f"{which}.{taken}.units"]).to(writer.weight.device)
    columns = made[f"{which}.{taken}.columns"].to(writer.weight.device)
    return placed(columns[:, :len(inputs)], inputs, writer.weight), None if writer.bias is None else columns[:, -1]


def mean(block: Block, which: str, part: Part, levels: tuple[int, ...], made: Made) -> Written:
    """The mean of a part's writers over these levels, each by the share of the part that it keeps."""
    stay = [1 - taken / part.count for taken in levels]
    found = [written(block, which, part, taken, made) for taken in levels]
    weight, bias = found[0]
    total = sum(stay) or 1.0
    return (sum(w.float() * (s / total) for s, (w, _) in zip(stay, found, strict=True)).to(weight.dtype),
            None if bias is None else sum(b.float() * (s / total) for s, (_, b) in zip(stay, found, strict=True))
            .to(bias.dtype))


def in_place(block: Block, which: str, found: Written) -> dict[str, Tensor]:
    """A writer's weight and bias as parameters by their names in the block."""
    writer, (weight, bias) = writer_of(block, which), found
    path = writer.path.removeprefix(f"{block.name}.")
    named = {writer.key.removeprefix(f"{block.name}."): weight.T if writer.transposed else weight}
    return named if bias is None else named | {f"{path}.bias": bias}
