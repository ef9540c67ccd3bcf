"""The matrices of a layer's experts, one by one: which stack they lie in, what they read, and which way round they are.

Nothing is guessed from names: the experts' module is run on a token with one expert alone, and the linear maps whose
matrix is a slice of a stack are caught, in their order (transformers' experts written out, implementation "eager").
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.model import discovery
from llmopt.model.computing import eager
from llmopt.model.experts import Experts, experts_of
from llmopt.model.weights import STACKS, Projection

UNSEEN = "it is a stack of matrices, as experts are, and its products cannot be seen one by one"
LINEAR = {torch.nn.functional.linear}                                       # W is [out, in]
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,                    # [in, out]
            torch.bmm, Tensor.bmm}                                                                  # of one expert


class Stack(NamedTuple):
    """A stack of matrices, one for each expert. step: stacks of one number read the same input; they count from 0."""

    parameter: str
    transposed: bool
    step: int


class _Enough(Exception):
    """Leaves a forward the rest of which nobody reads."""


class _Products(TorchFunctionMode):
    """Shows `see(parameter, input, transposed)` every linear map whose matrix is one of a stack."""

    def __init__(self, stacks: dict[int, str], see: Callable[[str, Tensor, bool], None]):
        super().__init__()
        self.stacks, self.see = stacks, see

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in LINEAR or function in PRODUCTS:
            x, weight = (*args, *(kwargs or {}).values())[:2]
            # W[e] lies in the stack's memory; of W[e].T the columns are what lies together
            name = self.stacks.get(weight.untyped_storage().data_ptr())
            if weight.dim() == 3 and len(weight) == 1:
                x, weight = x[0], weight[0]
            if name is not None and weight.dim() == 2:
                turned = weight.stride(0) < weight.stride(1)
                self.see(name, x, (function in PRODUCTS) != turned)
        return function(*args, **(kwargs or {}))


def stacks_of(experts: Experts) -> tuple[Stack, ...]:
    """How the module uses its stacks, in the order of its calls; seen once.

    Raises LlmoptError where that cannot be seen, or not all of them are seen.
    """
    held = vars(experts.module)
    if STACKS not in held:
        held[STACKS] = _seen(experts)
    return held[STACKS]


def matrices(layer: nn.Module, name: str) -> list[Projection]:
    """The experts' matrices of a decoder layer of this name, expert by expert; empty: it has none that can be seen."""
    experts = known(layer, name)
    if experts is None:
        return []
    return [Projection(experts.name, experts.module, stack.parameter, expert) for expert in range(experts.count)
            for stack in stacks_of(experts)]


def known(layer: nn.Module, name: str) -> Experts | None:
    """The experts of a decoder layer whose matrices can be seen one by one, or None."""
    try:
        experts = experts_of(layer, name)
        if experts is not None:
            stacks_of(experts)
    except LlmoptError:
        return None
    return experts


def seen_dense(layer: nn.Module, left: dict[str, str]) -> dict[str, str]:
    """What discovery says of a layer's weights that stay dense, without the stacks whose matrices are seen here."""
    if discovery.STACK not in left.values():
        return left
    experts = known(layer, "")
    seen = {f"{experts.name.lstrip('.')}.{stack.parameter}" for stack in stacks_of(experts)} if experts else ()
    return {name: UNSEEN if why == discovery.STACK else why for name, why in left.items() if name not in seen}


@torch.no_grad()
def inputs(experts: Experts, expert: int, x: Tensor, parameter: str) -> Tensor:
    """What one expert's matrix of this stack reads [N, in] when the expert is given tokens [N, d]."""
    seen: list[Tensor] = []

    def see(name: str, given: Tensor, transposed: bool) -> None:
        if name == parameter:
            seen.append(given)
            raise _Enough

    try:
        with eager(experts.module), _Products(_places(experts.module), see):
            experts.output(expert, x)
    except _Enough:
        return seen[0]
    raise LlmoptError(f"{experts.name}: what {parameter} reads cannot be seen")


def _places(module: nn.Module) -> dict[int, str]:
    return {getattr(module, name).untyped_storage().data_ptr(): name for name in discovery.stacks(module)}


def _seen(experts: Experts) -> tuple[Stack, ...]:
    """By one token through a copy with the first expert's shapes, whatever the size of the stacks."""
    names = discovery.stacks(experts.module)
    shapes = {name: getattr(experts.module, name).shape for name in names}
    copied = experts.module.__new__(type(experts.module))
    vars(copied).update(vars(experts.module))
    copied._parameters = {name: None if given is None else nn.Parameter(
        torch.zeros(1, *given.shape[1:]).expand(given.shape), requires_grad=False)
        for name, given in experts.module._parameters.items()}
    trial = type(experts)(experts.name, copied, copied, experts.count)
    for width in dict.fromkeys(shapes[names[0]][1:]):
        calls: list[tuple[str, Tensor, bool]] = []
        watching = _Products(_places(copied), lambda *call, calls=calls: calls.append(call))
        try:
            with torch.no_grad(), eager(copied), watching, refusals("of another width, or a kind that nobody knows"):
                out = trial.output(0, torch.zeros(1, width))
        except LlmoptError:
            continue
        if sorted(name for name, _, _ in calls) == sorted(names) and out.shape == (1, width):
            read = {id(x): x for _, x, _ in calls}
            return tuple(Stack(name, transposed, [*read].index(id(x))) for name, x, transposed in calls)
    raise LlmoptError(f"{experts.name}: how it uses {', '.join(names)} cannot be seen, so they stay dense")
