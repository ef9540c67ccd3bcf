"""Every named combination of the cache, on every architecture: what holds for all of them.

By default each combination is seen on one architecture, and every architecture with some; --full runs all pairs.
"""
import pytest

from llmopt import kv
from llmopt.parts import build, names
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
    spine.assert_a_row_of_padding_disturbs_nobody(model, steps)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.full)])
@pytest.mark.parametrize("allocate", names("allocator"))
def test_a_later_mask_hides_what_is_held_whoever_shares_it_out_and_however_it_is_stored(allocate, family):
    heads = "heads.span" if allocate == "heads" else None
    steps = [build("heads.span", {}), spine.fitted(build("heads.replay", {})),
             kv.SnapKV(ratio=0.75, window=4, allocate=allocate, heads=heads), kv.Quant(residual=4, every=4)]
    spine.assert_rows_and_attention(spine.model_of(family), steps)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_entries_that_stand_for_several_weigh_as_many(family):
    counting = {"ems_merge": {"tau": 0.1, "merge_keys": True, "count": True}}
    spine.assert_rows_and_attention(spine.model_of(family), [kv.H2O(ratio=0.75, reduce=counting)])
