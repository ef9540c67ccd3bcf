"""Which of its chosen experts a token really goes to: a gate in front of each experts' module, and one behind it.

The module is given the pairs of token and expert that are left, each as a token with a single expert, and computes
nothing else, whatever transformers' `experts_implementation` is. An index beyond the experts would not do (5.23):
"eager" skips it on most models, "grouped_mm" leaves what it gives there uninitialised, "batched_mm" has no such row.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmopt.errors import LlmoptError
from llmopt.model.blocks import blocks
from llmopt.model.experts import Experts, Routed, experts_of
from llmopt.runtime.forward import Forward

Left = Callable[[int, Routed], Tensor]          # (layer, what its experts are given) -> weights [N, k]; 0: skipped


class Gate:
    """The hooks of one layer. left: tells the weights that count instead of the router's, 0 where an expert is skipped.

    now: what a forward holds between the two hooks, in each thread its own.
    """

    def __init__(self, experts: Experts, layer: int, left: Left, now: Forward):
        self.experts, self.layer, self.left, self.now = experts, layer, left, now

    def hooks(self) -> list[RemovableHandle]:
        """Put the gate up."""
        return [self.experts.module.register_forward_pre_hook(self._before, with_kwargs=True),
                self.experts.module.register_forward_hook(self._behind)]

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.experts.call(args, kwargs)
        given = self.experts.routed(args, kwargs)
        weights = self.left(self.layer, given)
        places = weights.flatten().nonzero().flatten()
        if len(places) == weights.numel() and weights is given.weights:
            return None
        self.now.pairs[self.layer] = (places, weights.shape)
        named = zip(list(call.arguments)[:3], (given.x[places // weights.shape[1]], given.index.flatten()[places, None],
                                               weights.flatten()[places, None]), strict=True)
        call.arguments.update(named)
        return call.args, call.kwargs

    @torch.compiler.disable
    def _behind(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        places, shape = self.now.pairs.pop(self.layer, (None, None))
        if places is None:
            return None
        whole = output.new_zeros(shape.numel(), output.shape[-1]).index_copy(0, places, output)
        return whole.view(*shape, -1).sum(1)                                # [N, d], summed in float32


def layers_with_experts(model: nn.Module) -> dict[int, Experts]:
    """By the index of the layer; raises LlmoptError for a model that has none."""
    found = {block.index: experts_of(block.module, block.name) for block in blocks(model)}
    found = {index: experts for index, experts in found.items() if experts is not None}
    if not found:
        raise LlmoptError(f"{model.config.model_type}: its layers have no experts, so there are none to skip")
    return found


@contextmanager
def gated(model: nn.Module, left: Left) -> Iterator[None]:
    """Inside, each token goes only to the experts that `left` gives a weight."""
    now = Forward()
    handles = [handle for layer, experts in layers_with_experts(model).items()
               for handle in Gate(experts, layer, left, now).hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
