"""What layers keep beside keys and values: states of convolutions, Mamba and linear attention, in transformers' form.

No method acts on them. They have read every token, those that were evicted too, and cannot take one back.
"""
import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)


def states_by_layer(config: Any) -> list[int]:
    """How many states each layer of a causal LM keeps; 0: none."""
    return [layer.number_of_states if isinstance(layer, LinearAttentionCacheLayerMixin) else 0
            for layer in DynamicCache(config=config).layers]


def new_states(counts: list[int]) -> Cache:
    """A cache of transformers' own for so many states of each layer, empty."""
    return Cache(layers=[LinearAttentionLayer(count) if count else DummyLayer() for count in counts])


def copied(states: Cache) -> Cache:
    """A copy to continue from: transformers writes into the tensors of a state."""
    twin = copy.copy(states)
    twin.layers = [_copied(layer) for layer in states.layers]
    return twin


def _copied(layer: LinearAttentionLayer | DummyLayer) -> LinearAttentionLayer | DummyLayer:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):                             # by number of the state
            vars(twin)[name] = {i: x.clone() if isinstance(x, Tensor) else x for i, x in value.items()}
    return twin


def tensors_of(states: Cache) -> list[Tensor]:
    """Every tensor that is held."""
    return [x for layer in states.layers if isinstance(layer, LinearAttentionLayer)
            for x in (*layer.conv_states.values(), *layer.recurrent_states.values()) if x is not None]
