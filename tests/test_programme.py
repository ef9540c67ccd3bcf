import ctypes
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from llmopt.calibration.programme import Programme
from llmopt.errors import BudgetError


def greedy(programme: Programme) -> list[int]:
    """From the cheapest options, step after step the one that takes most damage away for its price."""
    picks = [min(range(len(row)), key=row.__getitem__) for row in programme.cost]
    while True:
        steps = [(unit, option) for unit, row in enumerate(programme.damage) for option in range(len(row))
                 if row[option] < row[picks[unit]]
                 and programme.price([*picks[:unit], option, *picks[unit + 1:]]) <= programme.room]
        if not steps:
            return picks
        unit, option = max(steps, key=lambda s: (programme.damage[s[0]][picks[s[0]]] - programme.damage[s[0]][s[1]])
                           / max(1e-9, programme.cost[s[0]][s[1]] - programme.cost[s[0]][picks[s[0]]]))
        picks[unit] = option


@st.composite
def programmes(draw) -> Programme:
    shapes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    damage = [draw(st.lists(st.floats(0, 10), min_size=n, max_size=n)) for n in shapes]
    cost = [draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)) for n in shapes]
    least, most = Programme(damage, cost, 0).reach
    return Programme(damage, cost, draw(st.integers(least, most)))


@settings(max_examples=60, deadline=None)
@given(programmes())
def test_no_plan_that_fits_does_less_and_greedy_never_does(programme):
    best = programme.best()
    assert programme.price(best) <= programme.room
    fitting = [p for p in itertools.product(*(range(len(row)) for row in programme.cost))
               if programme.price(p) <= programme.room]
    assert programme.harm(best) == pytest.approx(min(map(programme.harm, fitting)), abs=1e-7)
    assert programme.harm(best) <= programme.harm(greedy(programme)) + 1e-7


def test_by_hand():
    programme = Programme([[1.0, 0.2], [5.0, 0.1]], [[2, 4], [2, 4]], 6)
    assert programme.best() == [0, 1] and programme.reach == (4, 8)
    assert Programme([[1.0, 0.2], [5.0, 0.1]], [[2, 4], [2, 4]], 9).best() == [1, 1]
    assert Programme([[0.0, 0.0]] * 3, [[4, 2]] * 3, 99).best() == [1, 1, 1]               # no use: the cheaper one
    with pytest.raises(BudgetError, match="3 cannot be met: the least possible is 4"):
        Programme([[1.0, 0.2], [5.0, 0.1]], [[2, 4], [2, 4]], 3).best()


def test_costs_of_files_are_met_to_the_byte():
    """Large sizes without a common divisor, of which the solver's tolerance must not make a byte too many."""
    sizes = [10_000_019, 10_000_079, 10_000_103]
    cost = [[size * bits // 8 for bits in (2, 3, 8)] for size in sizes]
    for room in (sum(row[1] for row in cost), sum(row[1] for row in cost) - 1):
        programme = Programme([[3.0, 1.0, 0.0]] * 3, cost, room)
        assert programme.price(programme.best()) <= room
    assert sorted(programme.best()) == [0, 1, 1]


def test_further_plans_differ_and_do_ever_more_damage():
    programme = Programme([[4.0 * (i + 1), 1.0, 0.5 / (i + 1)] for i in range(5)], [[2, 3, 4]] * 5, 15)
    plans = list(programme.plans(6, apart=2))
    assert len(plans) == 6 and plans[0] == programme.best()
    harms = [programme.harm(plan) for plan in plans]
    assert harms == sorted(harms)
    assert all(sum(a != b for a, b in zip(one, other, strict=True)) >= 2
               for one, other in itertools.combinations(plans, 2))
    few = list(Programme([[1.0, 0.0]], [[1, 2]], 2).plans(5))
    assert few == [[1], [0]]                                                                # and none is left


def test_what_the_solver_prints_is_kept_off_stdout(monkeypatch, capfd):
    """By compiled code, whose buffer may be flushed long after; what is printed before and after stays there."""
    compiled, solve = ctypes.CDLL(None), optimize.milp

    def talking(*args, **kwargs):
        found = solve(*args, **kwargs)
        compiled.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
        return found

    monkeypatch.setattr(optimize, "milp", talking)
    compiled.printf(b"before\n")
    assert Programme([[1.0, 0.0]], [[1, 2]], 2).best() == [1]
    compiled.printf(b"after\n")
    compiled.fflush(None)
    told = capfd.readouterr()
    assert told.out == "before\nafter\n" and "Highs" in told.err
