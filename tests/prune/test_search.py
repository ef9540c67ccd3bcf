"""The search on numbers: offspring keep the price, the parent only gets better, seeds are what a table says."""
import math
from random import Random

import pytest

from llmopt.prune.search import LAST, Space, evolved, mended, offspring
from llmopt.prune.seeds import filled, greedy, summed, table
from llmopt.prune.supernet import Option, Part, options, space
from tests.prune.test_supernet import part


def chain(budget=6, blocks=5, levels=4):
    """Blocks whose option o takes o away, the last one their attention too."""
    return Space([[(o,) for o in range(levels)]] * blocks,
                 [[tuple(t for t in (o - 1, o + 1) if 0 <= t < levels) for o in range(levels)]] * blocks,
                 [[o < levels - 1 for o in range(levels)]] * blocks, (budget,))


def test_offspring_are_distinct_and_keep_the_price():
    draw, field = Random(0), chain()
    parent = mended(field, (0, 0, 3, 3, 0), draw)
    found = offspring(field, parent, 12, 4, draw)
    assert len(set(found)) == 12 and parent not in found
    assert all(field.spent(plan) == [6] for plan in [parent, *found])
    assert found == offspring(field, parent, 12, 4, _after(Random(0), field))


def _after(draw, field):
    mended(field, (0, 0, 3, 3, 0), draw)
    return draw


def test_two_accounts_each_keep_their_own_price():
    own = {"attention": part(4, 10, levels=range(4)), "mlp": part(8, 1, levels=(0, 2, 4, 6))}
    of = options(own, drop=False)
    field = space([own] * 4, [of] * 4, [99] * 4, (40, 8))
    parent = tuple([of.index(Option(1, 2))] * 4)
    found = offspring(field, parent, 20, 4, Random(1))
    assert field.spent(parent) == [40, 8] and len(found) == 20
    assert all(field.spent(plan) == [40, 8] for plan in found)


def test_a_plan_keeps_attention_somewhere():
    field = chain(budget=15)
    full = mended(field, field.dense, Random(0))
    assert field.spent(full) == [14] and field.attending(full) == 1
    assert all(field.attending(plan) for plan in offspring(field, full, 5, 4, Random(0)))


def test_the_parent_never_gets_worse_and_stages_only_pass_on_the_best():
    field, seen, worth = chain(budget=8, blocks=6), [], (5, 1, 4, 2, 3, 6)

    def fitness(plans, stage):
        seen.append((stage, len(plans)))
        return [sum(w * o * o for w, o in zip(worth, plan, strict=True)) for plan in plans]

    start = mended(field, (2, 2, 2, 2, 0, 0), Random(0))
    best, log = evolved(field, start, fitness, 12, 10, (4, 2), 3, Random(0))
    assert log == sorted(log, reverse=True) and log[-1] < log[0] and fitness([best], LAST) == [log[-1]]
    assert seen[:4] == [(LAST, 1), (0, 10), (1, 4), (LAST, 2)] and len(log) == 13
    assert (best, log) == evolved(field, start, fitness, 12, 10, (4, 2), 3, Random(0))


def test_seeds_see_that_a_run_of_blocks_is_cheap():
    """Six blocks of FFN and attention; a block alone costs 4 to 5, one behind a gone one 1, a step of the FFN 2."""
    alone = (5, 5, 5, 4, 5, 4.5)
    own = {"attention": Part(None, 1, 4), "mlp": part(6, 1, levels=(0, 2, 4))}
    of = options(own, drop=True)
    field = space([own] * 6, [of] * 6, [10] * 6, (20,))

    def fitness(plans, stage):
        found = []
        for plan in plans:
            picks = [of[o] for o in plan]
            found.append(sum((1 if b and picks[b - 1].drop else alone[b]) if p.drop else p.mlp
                             for b, p in enumerate(picks)))
        return found

    assert of[0] == Option(0, 0) and of[-1].drop and field.prices[0][-1] == (10,)
    damage = table([own] * 6, [of] * 6, field.dense, fitness)
    assert damage[3] == [0, 2, 4, 4]
    gone = greedy(field, [of] * 6, damage, fitness)
    assert gone == [3, 4]
    found = filled(field, [of] * 6, damage, gone, Random(0))
    assert set(found) == {"measured", "measured, 1 blocks gone", "measured, 2 blocks gone"}
    assert all(field.spent(plan) == [20] for plan in found.values())
    assert fitness([found["measured, 2 blocks gone"]], LAST) == [5]
    assert field.spent(summed(field, damage, {3: 3, 4: 3}))[0] == 20


def test_a_table_adds_what_two_parts_cost_and_knows_what_it_has_not_measured():
    own = {"attention": part(2, 5, levels=(0, 1, 2)), "mlp": part(9, 1, levels=(0, 2, 4, 6, 9))}
    of, seen = options(own, drop=True), []

    def harm(option):
        return 99 if option.drop else 3 * option.attention + option.mlp ** 2 + option.attention * option.mlp

    def fitness(plans, stage):
        seen.extend(of[plan[0]] for plan in plans)
        return [harm(of[plan[0]]) for plan in plans]

    def read(base, far):
        seen.clear()
        found = table([own], [of], (of.index(base),), fitness, far)[0]
        return dict(zip(of, found, strict=True))

    found = read(Option(0, 0), True)
    assert seen == [Option(0, 0), *(Option(0, m) for m in (2, 6, 9)), Option(1, 0), Option(2, 0), Option(2, 9, True)]
    assert found[Option(0, 4)] == 20 and found[Option(1, 2)] == 3 + 4 and found[of[-1]] == 99
    base = Option(1, 2)
    near = read(base, False)
    assert set(seen) == {base, Option(0, 2), Option(2, 2), Option(1, 0), Option(1, 4)}
    assert near[base] == 0 and near[Option(0, 0)] == harm(Option(0, 2)) + harm(Option(1, 0)) - 2 * harm(base)
    assert near[Option(1, 6)] == near[of[-1]] == math.inf
    back = read(of[-1], False)
    assert back[of[-1]] == 0 and back[Option(0, 0)] == -99 and back[Option(1, 0)] == 3 - 99


@pytest.mark.parametrize("option", [Option(0, 4), Option(1, 0), Option(2, 6, True)])
def test_steps_lead_both_ways(option):
    own = {"attention": part(2, 5, levels=(0, 1, 2)), "mlp": part(6, 1, levels=(0, 2, 4, 6))}
    of = options(own, drop=True)
    field, place = space([own], [of], [99], (7,)), of.index(option)
    near = {of[to] for to in field.steps[0][place]}
    wanted = {Option(0, 4): {Option(0, 2), Option(0, 6), Option(1, 4), Option(2, 4)},
              Option(1, 0): {Option(0, 0), Option(2, 0), Option(1, 2), Option(1, 6)}}
    if option.drop:
        assert near == {Option(0, 0), *(Option(a, 6) for a in (0, 1)), *(Option(2, m) for m in (0, 2, 4))}
    else:
        assert near == wanted[option]
    assert all(place in field.steps[0][of.index(other)] for other in near)
