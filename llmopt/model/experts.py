"""The experts of a decoder layer: stacks of matrices [E, ...] in one module, and a router that chooses among them.

Found by their shapes, whatever they are called. transformers calls such a module with what the tokens are, which
experts each goes to, and by what weight each expert's answer counts: (x [N, d], index [N, k], weights [N, k]).
"""
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model.discovery import stacks

SORTED = {"Llama4TextExperts"}
COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}      # the config's names for E


class Routed(NamedTuple):
    """What an experts' module is called with: x [N, d], index [N, k] of the experts of each token, weights [N, k]."""

    x: Tensor
    index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Experts:
    """count: E. name: of the module of the stacks, in the model; around: the module that holds it and the router."""

    name: str
    module: nn.Module
    around: nn.Module
    count: int

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of the module's forward."""
        return inspect.signature(self.module.forward)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """A call of the module; its first three arguments are those of `routed`."""
        return self.signature.bind(*args, **kwargs)

    def routed(self, args: tuple, kwargs: dict[str, Any]) -> Routed:
        """What a call of the module was given."""
        return Routed(*list(self.call(args, kwargs).arguments.values())[:3])

    def output(self, expert: int, x: Tensor) -> Tensor:
        """What one expert answers to tokens [N, d], not yet weighted."""
        index = torch.full((len(x), 1), expert, dtype=torch.long, device=x.device)
        return self.module(x, index, x.new_ones(len(x), 1))

    def of(self, expert: int) -> Iterator[Tensor]:
        """The tensors of one expert."""
        return (parameter.data[expert] for parameter in self.module.parameters())

    def keep(self, kept: Tensor) -> None:
        """Let only these experts stay, ascending indices; the router loses the rows of the others."""
        held = list(self.held())
        for module, name, tensor, place in held:
            own = tensor.detach().index_select(place, kept.to(tensor.device)).contiguous()
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(own, requires_grad=False)
            else:
                module._buffers[name] = own
        for module in {id(one): one for one in (self.around, *(one for one, *_ in held))}.values():
            for key, value in list(vars(module).items()):
                if type(value) is int and value == self.count and _is_count(key):
                    setattr(module, key, len(kept))

    def held(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        """(module, name, tensor, dimension of E) of all that has an entry for each expert.

        Raises LlmoptError where no router is among it.
        """
        found = [one for module in self.module.modules() for one in _own(module)]
        beside = [[one for module in child.modules() for one in _own(module)]
                  for child in self.around.children() if child is not self.module]
        routers = [tensors for tensors in beside if tensors and all(self._fits(tensor) for _, _, tensor in tensors)]
        if not any(tensor.dim() == 2 for tensors in routers for _, _, tensor in tensors):
            raise LlmoptError(f"{self.name}: beside its {self.count} experts there is no router with a row for each of "
                              "them, so none can leave")
        found += [one for tensors in routers for one in tensors]
        found += [one for one in _own(self.around) if one[2].shape == (self.count,)]
        for module, name, tensor in found:
            yield module, name, tensor, list(tensor.shape).index(self.count)

    def _fits(self, tensor: Tensor) -> bool:
        """True for a router's weight [E, d], and what else it has for each expert: [E], [1, E]."""
        return tensor.shape[0] == self.count or tuple(tensor.shape) == (1, self.count)


class Sorted(Experts):
    """Experts whose module is called with N rows for each of them, one after the other [E N, d]: every token's, times
    the router's weight, and 0 where it goes to another one. A token goes to one expert.
    """

    def routed(self, args: tuple, kwargs: dict[str, Any]) -> Routed:
        (rows,) = self.call(args, kwargs).arguments.values()
        rows = rows.view(self.count, -1, rows.shape[-1])
        return Routed(rows.sum(0), (rows != 0).any(2).int().argmax(0)[:, None], rows.new_ones(rows.shape[1], 1))

    def output(self, expert: int, x: Tensor) -> Tensor:
        one = self.module.__new__(type(self.module))
        vars(one).update(vars(self.module))
        one._parameters = {name: given[expert:expert + 1] for name, given in self.module._parameters.items()}
        return one(x)


def _own(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(module, name, tensor) for name, tensor in named if tensor.dim()]


def _is_count(key: str) -> bool:
    return key == "out_features" or "expert" in key and "per_tok" not in key


def experts_of(layer: nn.Module, name: str) -> Experts | None:
    """The experts of a decoder layer of this name; None: it has none. Raises LlmoptError for a kind not known here."""
    for path, module in layer.named_modules():
        held = stacks(module)
        if len(held) < 2:
            continue
        counts = {getattr(module, key).shape[0] for key in held}
        given = inspect.signature(module.forward).parameters.values()
        kind = Sorted if type(module).__name__ in SORTED else Experts
        taken = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in given)
        if len(counts) > 1 or kind is Experts and taken < 3:
            raise LlmoptError(f"{name}.{path}: experts of a kind that is not known here: a module is expected that is "
                              "called with tokens, the indices of their experts, and weights")
        found = kind(f"{name}.{path}", module, layer.get_submodule(path.rpartition(".")[0]), counts.pop())
        list(found.held())
        if kind is Sorted and found.around.top_k > 1:
            raise LlmoptError(f"{found.name}: each token goes to {found.around.top_k} of these experts, and what each "
                              "reads is known where it goes to one")
        return found
    return None


def told_count(config: Any, count: int) -> list[str]:
    """The keys of a config that say how many experts there are; raises LlmoptError where none does."""
    known = config.to_dict()
    found = sorted(key for key in COUNTS if known.get(key) == count)
    if not found:
        raise LlmoptError(f"{config.model_type}: its config does not say that its layers have {count} experts, so that "
                          "fewer cannot be stored")
    return found
