"""Every named combination of the cache on hybrids, some of whose layers keep states beside keys and values or instead.

By default every other combination is seen, each on one of them; --full runs all pairs.
"""
import re

import pytest
import torch

from llmopt import runtime
from llmopt.errors import LlmoptError
from llmopt.parts import build
from llmopt.runtime.states import tensors_of
from tests import tiny
from tests.kv import spine

KINDS = ["lfm2", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "olmo_hybrid", "qwen3_next", "qwen3_5_text",
         "qwen3_5_moe_text"]
COMBINATIONS = spine.combinations()
PAIRS = [pytest.param(name, kind, marks=() if number % 2 == 0 and number // 2 % len(KINDS) == place else
                      pytest.mark.full)
         for number, name in enumerate(COMBINATIONS) for place, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_combination_keeps_what_it_promises(name, kind):
    model, steps = tiny.make(kind), [spine.fitted(step) for step in COMBINATIONS[name]]
    if spine.turns(steps):
        with pytest.raises(LlmoptError, match=f"{kind}: how positions turn its keys is not known"), \
                spine.in_force(model, steps):
            pass
        return
    spine.assert_room_for_all_is_dense(model, steps)
    spine.assert_what_is_kept_is_the_prompts(model, steps)
    spine.assert_rows_and_attention(model, steps)
    spine.assert_a_row_of_padding_disturbs_nobody(model, steps)


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1", "olmo_hybrid"])
@torch.no_grad()
def test_two_that_go_on_from_one_cache_do_not_meet_in_its_states(kind):
    model, ids, more = tiny.make(kind), tiny.ids(2, 40), tiny.ids(2, 9, seed=5)
    with runtime.attached(model, build("kv.snapkv", {"budget": 12, "window": 4})):
        cache = model(ids).past_key_values
        before = cache.nbytes()
        first, again = (model(more, past_key_values=cache.fork()).logits for _ in range(2))
        single = cache.fork()
        each = torch.cat([model(more[:, i:i + 1], past_key_values=single).logits for i in range(9)], 1)
        assert torch.equal(first, again) and cache.nbytes() == before
        torch.testing.assert_close(each, first, atol=1e-4, rtol=1e-3)
        cache.reset()
        assert torch.equal(model(more, past_key_values=cache).logits, model(more).logits)


@torch.no_grad()
def test_a_cache_with_states_says_what_it_cannot_do():
    model, ids = tiny.make("lfm2"), tiny.ids(2, 40)
    with runtime.attached(model, build("kv.snapkv", {"budget": 12, "window": 4})):
        cache = model(ids).past_key_values
        with pytest.raises(LlmoptError, match="layers with a state .* cannot take a token back"):
            cache.without_last()
    before = [state.clone() for state in tensors_of(cache.states)]
    with pytest.raises(LlmoptError, match=re.escape("has none (detached?)")):
        model(ids[:, :9], past_key_values=cache)
    assert before and all(map(torch.equal, tensors_of(cache.states), before))      # which layer 0 would have written to


@torch.no_grad()
def test_a_forward_that_dies_behind_a_state_has_used_up_the_cache():
    model, ids = tiny.make("lfm2"), tiny.ids(2, 40)
    with runtime.attached(model, build("kv.snapkv", {"budget": 12, "window": 4})):
        cache = model(ids).past_key_values
        with pytest.raises(LlmoptError, match="attention_mask has 3 columns"):      # before any layer
            model(ids[:, :1], attention_mask=torch.ones(2, 3), past_key_values=cache)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], past_key_values=cache)
        handle.remove()
        with pytest.raises(LlmoptError, match="has failed in the middle"):
            model(ids[:, :1], past_key_values=cache)
