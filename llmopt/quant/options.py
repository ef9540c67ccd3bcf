"""What may be chosen for the weights of a step, unit by unit, what it costs, and how much may be spent.

A unit are the weights that read one input (q k v | o | gate up | down): kernels run them as one, so they are alike. Of
experts it is what the field `experts` says: those of the model, of a layer, or one of them.

    bits: B     what all weights at B bits take, in groups of `group_size`: codes and scales, in bits
    bytes: N    what is left of N for the units, once all else that the checkpoint will hold is taken off
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from llmopt.calibration.programme import Programme
from llmopt.errors import BudgetError, LlmoptError
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.outline import filed_bytes, outline
from llmopt.quant import vocabulary
from llmopt.quant.plan import DENSE, Choice, Target
from llmopt.quant.settings import Settings

Price = Callable[[Target], int]
Plan = dict[str, Choice]            # by the name of a weight whose bits were open
Table = dict[str, dict[Choice, float]]      # the damage of each choice, by the name of the unit


@dataclass(frozen=True)
class Unit:
    """Weights that are decided together, not yet at any bits, and what they may become."""

    name: str
    members: list[Target]
    choices: list[Choice]

    def cost(self, choice: Choice, price: Price) -> int:
        return sum(price(target.at(*choice)) for target in self.members)


@dataclass(frozen=True)
class Budget:
    """What the units may cost together, by the price of each weight; told: a total in the words of the recipe.

    over: what the checkpoint takes with a plan, header and all, beyond what is allowed; 0 or less: nothing.
    """

    room: int
    price: Price
    told: Callable[[int], str]
    over: Callable[[Plan], int] = lambda plan: 0

    def check(self, units: Sequence[Unit], spent: bool = True) -> None:
        """Raise BudgetError where not even the cheapest choices fit, telling what can be reached.

        spent: also where the checkpoint stays below its bytes with the dearest choices.
        """
        costs = [[unit.cost(choice, self.price) for choice in unit.choices] for unit in units]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        dearest = chosen(units, [of.index(max(of)) for of in costs])
        if least > self.room or spent and self.over(dearest) < 0:
            verb = "met" if least > self.room else "spent"
            raise BudgetError(f"{self.told(self.room)} cannot be {verb}; what can be chosen takes {self.told(least)} "
                              f"to {self.told(most)}")


def units_of(step: Settings, found: Sequence[Target]) -> list[Unit]:
    """The weights whose bits are open, by the input that they read; experts by their field.

    Group sizes that do not divide the columns of a unit are no choice for it; raises LlmoptError where none does.
    """
    members: dict[str, list[Target]] = {}
    for target in found:
        if not target.fixed:
            members.setdefault(target.group, []).append(target)
    return [Unit(name, of, [Choice(bits, size) for size in _sizes(step, of) for bits in _widths(step, size, of)])
            for name, of in members.items()]


def _sizes(step: Settings, members: list[Target]) -> list[int]:
    """The group sizes that the members can take alike; all columns in one group is one scale per channel."""
    own = [target.group_size for target in members if target.sized] or ([] if step.group_sizes else
                                                                        [members[0].group_size])
    first = {target.columns: target for target in reversed(members)}            # by columns
    fitting = [size for size in own or step.group_sizes if size == -1 or not any(n % size for n in first)]
    if not fitting:
        columns = min(first)
        raise LlmoptError(f"{first[columns].name}: none of the group_sizes {list(step.group_sizes)} divides its "
                          f"{columns} input features"
                          + (f" and the {', '.join(str(n) for n in first if n != columns)} of others that are decided "
                             "with it" if len(first) > 1 else "") + "; -1 is one scale per output channel")
    return list(dict.fromkeys(-1 if first.keys() == {size} and -1 in fitting else size for size in fitting))


def _widths(step: Settings, size: int, members: list[Target]) -> list[int]:
    """The bits to choose from; weights that stay as they are have no groups, so they come once."""
    return [bits for bits in sorted(set(step.widths)) if bits != DENSE or size == _sizes(step, members)[0]]


def budget(step: Settings, model: nn.Module, found: Sequence[Target], units: Sequence[Unit]) -> Budget:
    """What the units, which are the open ones of the targets, may cost."""
    fixed = [target for target in found if target.fixed]
    scale = torch.finfo(step.scale_type(model.dtype, at_once=spec_of(model).at_once)).bits
    if step.bytes is None:
        extra = scale + (0 if step.symmetric else math.ceil(step.bits))
        price = partial(_bits, extra=extra)
        size = sum(target.size for target in found)
        scales = sum(price(replace(target, bits=0)) for target in found if target.bits != DENSE)
        spent = sum(map(price, fixed))
        room = math.floor(step.bits * size * (1 + 1e-12) + 1e-6) + scales - spent
        return Budget(room, price, lambda total: f"an average of {(total + spent - scales) / size:.4g} bits")
    price = partial(stored, scale=scale, symmetric=step.symmetric, dense=torch.finfo(model.dtype).bits)
    usual = {t.name: unit.choices[0] for unit in units for t in unit.members}
    rest = _filed(step, model, with_plan(found, usual)) - sum(price(t.at(*usual[t.name])) for t in found if not t.fixed)
    return Budget(step.bytes - rest, price, lambda total: f"{total + rest:,} bytes",
                  lambda plan: _filed(step, model, with_plan(found, plan)) - step.bytes)


def average(step: Settings, bound: Budget, units: Sequence[Unit]) -> float:
    """The bits that all units alike would have within the budget, in their own groups; a fraction."""
    members = [target for unit in units for target in unit.members]
    low, high = ([sum(bound.price(replace(t, bits=bits)) for t in members) for bits in (0, 32)])
    return max(0.0, 32 * (bound.room - low) / max(1, high - low))


def programme(bound: Budget, units: Sequence[Unit], table: Table) -> Programme:
    """The programme over the choices of the units, in their order; its best plan keeps to the budget."""
    problem = Programme([[table[unit.name][choice] for choice in unit.choices] for unit in units],
                        [[unit.cost(choice, bound.price) for choice in unit.choices] for unit in units], bound.room)
    while (over := bound.over(chosen(units, problem.best()))) > 0:
        problem = replace(problem, room=problem.room - over)
    return problem


def chosen(units: Sequence[Unit], picks: Sequence[int]) -> Plan:
    """What the options of a programme's plan mean for each weight."""
    return {target.name: unit.choices[pick] for unit, pick in zip(units, picks, strict=True) for target in unit.members}


def with_plan(found: Sequence[Target], plan: Plan) -> list[Target]:
    """The targets, those that a plan names as it says."""
    return [target.at(*plan[target.name]) if target.name in plan else target for target in found]


def _bits(target: Target, extra: int) -> int:
    """Bits of codes and scales, as if codes could be packed without a gap."""
    groups = 0 if target.bits == DENSE else target.out * target.groups
    return target.size * target.bits + groups * extra


def stored(target: Target, scale: int, symmetric: bool, dense: int) -> int:
    """Bytes that a weight takes in a file: packed codes, scales, zero points, its shape (model/packing.py)."""
    if target.bits == DENSE:
        return target.size * dense // 8
    words = target.out * -(-target.columns * target.bits // 32)
    zeros = 0 if symmetric else target.groups * -(-target.out * target.bits // 32)
    return 4 * (words + zeros) + target.out * target.groups * scale // 8 + 16


def _filed(step: Settings, model: nn.Module, decided: Sequence[Target]) -> int:
    """Bytes of the checkpoint whose weights are so decided."""
    skeleton = outline(model)
    weights = {p.name: p for block in blocks(skeleton) for group in block.weights() for p in group}
    for target in decided:
        if target.bits != DENSE:
            weights[target.name].codes = step.without_values(target, model.dtype)
    vocabulary.sketch(step, skeleton)
    return filed_bytes(skeleton)
