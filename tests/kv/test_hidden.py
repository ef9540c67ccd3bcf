"""What attention read of the tokens reaches a scorer that asks for it, beside their queries, and nobody else."""
import copy

import pytest
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv.base import Scorer
from llmopt.kv.listener import watch
from llmopt.model.blocks import attention_modules
from tests.tiny import CONFIGS, ids, make


class Seeing(Scorer):
    """Scores by the first channel of what attention read; notes all of it, by layer and position."""

    name, hidden = "kv.seeing", True
    found: list

    def queries(self):
        return None

    def score(self, view):
        assert view.hidden.shape[1] == view.queries.shape[2] == view.query_positions.shape[1]
        self.found.append((view.layer, view.query_positions[0].tolist(), view.hidden[0].clone()))
        return view.positions.float()


def method(**given):
    made = Seeing(**given)
    object.__setattr__(made, "found", [])
    return made


@torch.no_grad()
def read(model, *args, **kwargs) -> list[torch.Tensor]:
    """The inputs [B, T, E] of the attention modules in a dense forward, layer by layer."""
    found = []
    handles = [module.register_forward_pre_hook(
        lambda _, args, named: found.append(args[0] if args else named["hidden_states"]), with_kwargs=True)
        for module in attention_modules(model)]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_it_is_the_input_of_every_attention(family):
    model, tokens, seeing = make(family), ids(1, 20), method(budget=10)
    wanted = read(model, tokens)
    with runtime.attached(model, seeing):
        model(tokens, use_cache=True)
    assert [layer for layer, _, _ in seeing.found] == list(range(len(wanted)))
    for (_, places, hidden), dense in zip(seeing.found, wanted, strict=True):
        assert places == list(range(20))
        assert_close(hidden, dense[0], atol=1e-5, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in attention_modules(model))


@torch.no_grad()
def test_padding_turns_and_beams():
    """A padded row sees what it saw alone; what was read while decoding waits for the next turn, and follows a beam."""
    model, tokens, seeing = make("llama"), ids(2, 30), method(budget=30)
    mask = torch.ones_like(tokens)
    mask[1, 2:9] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = read(model, tokens[1:, mask[1].bool()])
    with runtime.attached(model, seeing):
        cache = model(tokens[:, :20], attention_mask=mask[:, :20], position_ids=places[:, :20],
                      use_cache=True).past_key_values
        assert not seeing.found and cache.layers[0].hidden.shape == (2, 20, 64)         # nothing to be dropped yet
        model(tokens[:, 20:21], attention_mask=mask[:, :21], position_ids=places[:, 20:21], past_key_values=cache)
        rows = torch.tensor([1, 1])
        cache.batch_select_indices(rows)
        mask, places = mask[rows], places[rows]
        object.__setattr__(seeing, "budget", 10)
        model(tokens[rows, 21:], attention_mask=mask, position_ids=places[:, 21:], past_key_values=cache)
    for layer, at, hidden in seeing.found:
        assert at == list(range(23))
        assert_close(hidden, wanted[layer][0], atol=1e-5, rtol=1e-5)
    assert len(seeing.found) == 6 and all(layer.hidden is None for layer in cache.layers)


@torch.no_grad()
def test_what_waits_under_another_method_is_forgotten():
    model, tokens, seeing = make("llama"), ids(1, 30), method(budget=10)
    with runtime.attached(model, kv.Expected(budget=30)):
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        assert cache.layers[0].queries.shape[2] == 20 and cache.layers[0].hidden is None
        assert not any(module._forward_pre_hooks for module in attention_modules(model))
    with runtime.attached(model, seeing):
        model(tokens[:, 20:], past_key_values=cache)
    assert all(at == list(range(20, 30)) for _, at, _ in seeing.found) and len(seeing.found) == 3


@torch.no_grad()
def test_copies_see_their_own():
    model, tokens, seeing = make("llama"), ids(1, 20), method(budget=10)
    with runtime.attached(model, seeing):
        twin = copy.deepcopy(model)
        twin(tokens, use_cache=True)
        assert runtime.attachment(model).now.hidden is None
        model(tokens, use_cache=True)
    assert len(seeing.found) == 3


@torch.no_grad()
def test_a_text_is_watched_layer_by_layer():
    model, tokens, held = make("llama"), ids(1, 20), []
    wanted = read(model, tokens)

    def see(view):
        assert_close(view.hidden, wanted[view.layer], atol=1e-5, rtol=1e-5)
        held.append((view.layer, view.keys.shape[2], view.queries.shape[2]))

    watch(model, tokens[0], see)
    assert held == [(0, 20, 20), (1, 20, 20), (2, 20, 20)] and runtime.attachment(model) is None
