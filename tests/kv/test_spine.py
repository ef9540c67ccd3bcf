"""Every named combination of the cache, on every architecture: what holds for all of them.

By default each combination is seen on one architecture, and every architecture with some; --full runs all pairs.
"""
import pytest

from tests import tiny
from tests.kv import spine

COMBINATIONS = spine.combinations()
FAMILIES = list(tiny.CONFIGS)
PAIRS = [pytest.param(name, family, marks=() if (number + place) % len(FAMILIES) == 0 else pytest.mark.full)
         for number, name in enumerate(COMBINATIONS) for place, family in enumerate(FAMILIES)]


def test_there_are_more_than_thirty_and_each_is_of_the_cache():
    assert len(COMBINATIONS) > 30
    assert all(any(step.name.startswith("kv.") for step in steps) for steps in COMBINATIONS.values())


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_combination_keeps_what_it_promises(name, family):
    model, steps = spine.model_of(family), [spine.fitted(step) for step in COMBINATIONS[name]]
    spine.assert_room_for_all_is_dense(model, steps)
    spine.assert_what_is_kept_is_the_prompts(model, steps)
    spine.assert_rows_and_attention(model, steps)
