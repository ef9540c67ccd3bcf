"""The output head by itself: logits of some hidden states, as the model computes them."""
from typing import Any

from torch import Tensor, nn

from llmopt.model.blocks import decoder

LOGITS = 1 << 24        # of a backward pass, held at a time, in three copies: 200 MB of fp32


class _Decoded(tuple):
    """The output of a decoder that gave hidden states and nothing else, read by name or by place."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> Any:
        return None                         # no cache, no attention maps, no router logits


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:      # [B, t, E] -> [B, t, V]
    """Logits of the decoder's output `hidden`, by the model's own code behind its decoder (scaling, softcap).

    All logits of a batch take B x T x V numbers; this takes those of as many tokens as `hidden` has.
    """
    inner = decoder(model)
    inner.forward = lambda *args, **kwargs: _Decoded((hidden,))
    try:
        return model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        del inner.forward
