"""A causal LM that no table describes: its decoder layers and their linear maps, found by looking and by one forward.

The layers are the longest nn.ModuleList of the decoder. The rest is seen while a copy without weights reads a few
tokens (on the meta device, so that nothing is computed): which linear maps run, which of them read one tensor, and
whether a layer reads what an earlier one made beside the hidden state. Nothing is guessed from names.
"""
import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals

FOUND = "_llmopt_found"         # where a decoder layer keeps what was found of it
LOOKING = "llmopt_looking"      # the attention function of the copy, and where its attention modules keep what they did
GIVEN = "llmopt_given"          # where they keep what they were given by it
ASKS = {"position_bias": "a bias by position"}
ROWS, TOKENS = 3, 7             # of what the copy reads: no other size of a model is likely to be 21
NARROW = 8                      # rows or columns of a linear map that is not worth its codes,
TINY = 400                      # or less than so small a part of its layer's weights
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN_FORWARD, NO_ROWS = "it has a forward of its own", "it does not read one row for each token"
ELEMENTWISE = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0", "ToCopyBackward0",
               "MulBackward0")         # steps of autograd behind which a number is still at its place
STACK = "it is a stack of matrices, as experts are"


@dataclass
class Found:
    """What one forward has shown of a decoder layer; names are relative to it.

    groups: the linear maps that read one input, in the order in which they are called. left: what stays dense, and why.
    entries: of the tuple that the layer returns, whose first entry is the hidden state; 0: it returns that alone.
    earlier: arguments in which it is given what earlier layers made. attention: the modules that attend by
    transformers' attention interface. at_once: transformers cannot load it with its weights packed, as they are
    asked for before they come.
    """

    groups: list[list[str]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    entries: int = 0
    earlier: list[str] = field(default_factory=list)
    attention: dict[str, "Attends"] = field(default_factory=dict)
    at_once: bool = False


@dataclass
class Attends:
    """How a module attends: H query heads, G KV heads, D channels of queries and keys, and as many of values.

    window: tokens that a query sees. asks: what else it wants of the attention function. writer: the linear map that
    reads what the heads give, as they give it or times a gate; empty: none does.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    asks: tuple[str, ...]
    writer: str = ""


def layers_path(model: nn.Module) -> str:
    """The name of the list of decoder layers; raises LlmoptError where there is none, or two that could be it."""
    if FOUND not in vars(model):
        vars(model)[FOUND] = _longest(model)
    return vars(model)[FOUND]


def _longest(model: nn.Module) -> str:
    found = dict(_lists(model))
    decoder = model.get_decoder()
    inside = {path for path, layers in found.items() if any(layers is module for module in decoder.modules())}
    found = {path: len(layers) for path, layers in found.items() if path in inside or not inside}
    longest = [path for path, count in found.items() if count == max(found.values())]
    kind = model.config.model_type
    if not longest:
        raise LlmoptError(f"architecture {kind!r} is not supported: its decoder layers are no nn.ModuleList")
    if len(longest) > 1:
        raise LlmoptError(f"architecture {kind!r} is not supported: {' and '.join(longest)} could both be its decoder "
                          "layers")
    return longest[0]


def _lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules with linear maps inside, by name; none that is inside another one."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _lists(child, f"{prefix}{name}.")
        elif len(child) and all(_holds_weights(member) for member in child):
            yield f"{prefix}{name}", child


def _holds_weights(layer: nn.Module) -> bool:
    return not is_linear(layer) and any(is_linear(module) or stacks(module) for module in layer.modules())


def is_linear(module: nn.Module) -> bool:
    """True for a module that is a matrix: y = W x + b."""
    return isinstance(module, (nn.Linear, Conv1D))


def stacks(module: nn.Module) -> list[str]:
    """The parameters of a module that are stacks of matrices, one for each expert."""
    if isinstance(module, CONVOLUTIONS):
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3
            and min(parameter.shape) > 1]


def found_of(model: nn.Module, path: str) -> list[Found]:
    """What is known of every decoder layer; found by one forward when it is asked for the first time."""
    layers = model.get_submodule(path)
    if any(FOUND not in vars(layer) for layer in layers):
        for layer, found in zip(layers, _look(model, path), strict=True):
            vars(layer)[FOUND] = found
    return [vars(layer)[FOUND] for layer in layers]


def note_of(layers: list[Found]) -> str:
    """What plans and cards say of the weights of these layers that stay as they are; empty: none does."""
    reasons = Counter((name.rpartition(".")[2], reason) for layer in layers for name, reason in layer.left.items())
    told: dict[str, list[str]] = {}
    for (name, reason), count in reasons.items():
        told.setdefault(reason, []).append(f"{count} {name}")
    return "; ".join(f"left dense: {', '.join(names)} ({reason})" for reason, names in told.items())


def decoder_path(model: nn.Module, path: str) -> str:
    """The name of the model around the decoder layers, which makes hidden states of tokens."""
    while "." in path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            return path
    return ""


def rotary_path(model: nn.Module, path: str) -> str | None:
    """The name of the module that makes rotary tables for the decoder; None where there is none."""
    inside = decoder_path(model, path)
    prefix = f"{inside}." if inside else ""
    return next((prefix + name for name, module in model.get_submodule(inside).named_children()
                 if "RotaryEmbedding" in type(module).__name__), None)


def _look(model: nn.Module, path: str) -> list[Found]:
    """By the attention interface, which needs no masks; a model with a loop of its own may need them."""
    try:
        return _seen(model, path, LOOKING)
    except LlmoptError as first:
        try:
            return _seen(model, path, None)
        except LlmoptError as second:
            told = dict.fromkeys([str(first), str(second)])
            raise LlmoptError("; with its own attention: ".join(told)) from second


def _seen(model: nn.Module, path: str, attention: str | None) -> list[Found]:
    """What a forward shows whose attention function is `attention`; None: the model's own."""
    inside = decoder_path(model, path)
    decoder = _without_weights(_unpacked(model).get_submodule(inside))
    if attention:
        for config in {id(c): c for c in (vars(m).get("config") for m in decoder.modules()) if c is not None}.values():
            config._attn_implementation_internal = attention
    decoder.warn_if_padding_and_no_attention_mask = lambda *_: None         # which looks at the values of ids
    layers = decoder.get_submodule(path.removeprefix(f"{inside}."))
    looks = [_Look(layer) for layer in layers]
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
    with refusals(f"{model.config.model_type}: its layers cannot be looked at"), ExitStack() as watching:
        for look in looks:
            watching.enter_context(look.watching())
        with torch.enable_grad():
            decoder(input_ids=ids, use_cache=False)
    known = [look.found() for look in looks]
    for look, found in zip(looks, known, strict=True):
        found.at_once = _asked_for(decoder, look.layer, [name for group in found.groups for name in group])
    return known


@torch.no_grad()
def _asked_for(decoder: nn.Module, layer: nn.Module, names: list[str]) -> bool:
    """True if `_init_weights`, which transformers calls before it loads, wants weights that are packed in the files."""
    for name in names:
        layer.get_submodule(name)._parameters.pop("weight")
    return any(_misses(decoder, module) for module in layer.modules())


def _misses(decoder: nn.Module, module: nn.Module) -> bool:
    """True if `_init_weights` of one module asks for an attribute that is not there."""
    try:
        decoder._init_weights(module)
    except AttributeError:
        return True
    except RuntimeError:                                    # it asks for values, which a meta tensor has none of
        pass
    return False


def _unpacked(model: nn.Module) -> nn.Module:
    """The model, or one like it: where weights came as codes, their layers are others until the first forward."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with init_empty_weights():
        return type(model)(config)


def _without_weights(decoder: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    held = [*decoder.parameters(), *decoder.buffers(),
            *(value for module in decoder.modules() for value in vars(module).values() if isinstance(value, Tensor))]
    memo: dict[int, Any] = {id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
                            if isinstance(tensor, nn.Parameter) else tensor.detach().to("meta") for tensor in held}
    return copy.deepcopy(decoder, memo).eval()


def _looking(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple:
    """Stands in for attention: notes what is asked, gives [B, T, H, D] of the right shape."""
    mask = args[0] if args else kwargs.get("attention_mask")
    asks = [word for name, word in ASKS.items() if kwargs.get(name) is not None]
    sinks = kwargs.get("s_aux")
    asks += ["attention sinks (s_aux) that are not one for each head"] * (
        sinks is not None and sinks.shape != query.shape[1:2])
    asks += ["a mask of its own"] * (mask is not None) + ["more than one attention"] * (LOOKING in vars(module))
    batch, heads, tokens, dim = query.shape
    vars(module)[LOOKING] = Attends(heads, key.shape[1], dim, value.shape[3], kwargs.get("sliding_window"), tuple(asks))
    given = query.new_empty(batch, tokens, heads, value.shape[3]).requires_grad_()
    vars(module)[GIVEN] = given
    return given.clone(), None


AttentionInterface.register(LOOKING, _looking)


class _Look:
    """One decoder layer of the copy, watched while it runs."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.calls: list[tuple[str, tuple, bool]] = []          # name, what it read, whether a row is a token
        self.read: list[Tensor] = []                            # kept alive: storages are told apart by address
        self.inputs: dict[str, Tensor] = {}                     # what each linear map has read first
        self.entries, self.runs, self.same = 0, 0, True
        self.earlier: list[str] = []
        self.linears = {name: module for name, module in layer.named_modules() if is_linear(module)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the layer and its linear maps read is noted; experts give back what they read."""
        handles = [self.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                   self.layer.register_forward_hook(self._leave)]
        handles += [module.register_forward_hook(partial(self._note, name)) for name, module in self.linears.items()]
        for module in self.layer.modules():
            if stacks(module):
                module.forward = _echo
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Mark the hidden state, after a look for what others have marked."""
        hidden, args, kwargs = split(args, kwargs)
        self.runs += 1
        self.read.append(hidden)
        self.earlier += sorted({_word(path) for path, value in tree_flatten_with_path((args, kwargs))[0]
                                if isinstance(value, Tensor) and value.requires_grad} | _carried(args, kwargs))
        return (hidden.detach().requires_grad_().clone(), *args), kwargs

    def _leave(self, module: nn.Module, args: tuple, result: Any) -> None:
        self.entries = len(result) if isinstance(result, tuple) else 0
        hidden = result[0] if self.entries else result
        self.same = isinstance(hidden, Tensor) and hidden.shape == self.read[0].shape

    def _note(self, name: str, module: nn.Module, args: tuple, out: Any) -> None:
        x = args[0]
        place = x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x._version
        self.read.append(x)
        self.inputs.setdefault(name, x)
        maps = isinstance(out, Tensor) and out.shape == (*x.shape[:-1], out_features(module))
        by_token = [n for n in x.shape[:-1] if n > 1] in ([ROWS, TOKENS], [ROWS * TOKENS])
        self.calls.append((name, place, "" if maps and by_token else OWN_FORWARD if by_token else NO_ROWS))

    def found(self) -> Found:
        """What has been seen; raises LlmoptError for a layer that does not turn one hidden state into another."""
        kind = type(self.layer).__name__
        if self.runs != 1:
            raise LlmoptError(f"a {kind} runs {self.runs} times in one forward")
        if not self.same:
            raise LlmoptError(f"a {kind} does not return a hidden state like the one it reads")
        left = self._left()
        groups: dict[tuple, list[str]] = {}
        for name, place, _ in self.calls:
            if name not in left and name not in groups.get(place, ()):
                groups.setdefault(place, []).append(name)
        attention = {}
        for name, module in self.layer.named_modules():
            if LOOKING in vars(module):
                attention[name], given = vars(module)[LOOKING], vars(module)[GIVEN]
                attention[name].writer = next((linear for linear, x in self.inputs.items() if _gated(x, given)), "")
        return Found([*groups.values()], left, self.entries, self.earlier, attention)

    def _left(self) -> dict[str, str]:
        """What stays dense, and why."""
        stacked = {f"{name}.{part}".lstrip("."): getattr(module, part) for name, module in self.layer.named_modules()
                   for part in stacks(module)}
        experts = {(name.rpartition(".")[0].rpartition(".")[0], len(stack)) for name, stack in stacked.items()}
        total = sum(module.weight.numel() for module in self.linears.values())
        left = dict.fromkeys(stacked, STACK)
        for name, module in self.linears.items():
            calls, out = [call for call in self.calls if call[0] == name], out_features(module)
            reason = ("it does not run in a forward" if not calls else "it runs more than once in a forward"
                      if len(calls) > 1 else calls[0][2] or ("it has a row for each expert"
                      if (name.rpartition(".")[0], out) in experts else "it is too small to be worth it"
                      if min(module.weight.shape) < NARROW or module.weight.numel() * TINY < total else ""))
            left |= {name: reason} if reason else {}
        return left


def _gated(x: Tensor, given: Tensor) -> bool:
    """True if x is `given` in another shape, each of its numbers perhaps times another one."""
    waiting = [x.grad_fn] if x.numel() == given.numel() else []
    while waiting:
        node = waiting.pop()
        if getattr(node, "variable", None) is given:
            return True
        if node is not None and node.name() in ELEMENTWISE:
            waiting += [before for before, _ in node.next_functions]
    return False


def split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """(the hidden state, the other arguments) of a call of a decoder layer."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _echo(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for experts: which tokens they get is not known without values."""
    return hidden.clone()


def _carried(args: tuple, kwargs: dict) -> set[str]:
    """The arguments whose objects hold something that an earlier layer made, such as a cache."""
    named = {f"argument {index + 1}": value for index, value in enumerate(args)} | kwargs
    return {name for name, value in named.items() if hasattr(value, "__dict__") and not isinstance(value, Tensor)
            and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(vars(value)))}


def _word(path: tuple) -> str:
    """The name of an argument at a place of (args, kwargs)."""
    return str(getattr(path[1], "key", None) or f"argument {getattr(path[1], 'idx', 0) + 1}")


def out_features(module: nn.Module) -> int:
    """Rows of its matrix."""
    return module.nf if isinstance(module, Conv1D) else module.out_features
