"""What a model predicts in the second half of a text, whose first half was its prompt, with its methods in force.

The prompt is read as `generate` reads one: by the prefill selector, and compressed by the kv method. The rest is read
on what was kept, in one piece during which nothing is dropped, which gives what decoding token by token gives; a method
that compresses while decoding (`every`) gets pieces of so many tokens and compresses after each. Such pieces of several
tokens pass through a prefill selector too, if there is one, where single tokens would not.
"""
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from llmopt import runtime
from llmopt.errors import LlmoptError
from llmopt.runtime.compression import ATTENTION, EVICTOR, STORE
from llmopt_evals.readout import Readout

SHORTEST = 4        # tokens of a row: a prompt of two, one that is read after it, one that is predicted


def scored(length: int) -> int:
    """The number of predictions in a row of `length` tokens."""
    return length - length // 2 - 1


def targets(ids: Tensor) -> Tensor:
    """The tokens that are predicted: ids [B, T] -> [B, scored(T)]."""
    return ids[:, ids.shape[1] // 2 + 1:]


def states(readout: Readout, ids: Tensor) -> Tensor:
    """States [B, scored(T), C] from which `targets` are predicted, of rows of one length: ids [B, T]."""
    prompt, rest = ids.tensor_split([ids.shape[1] // 2], 1)
    _, output = readout.states(prompt, use_cache=True)
    cache, every = output.past_key_values, _every(readout.model)
    if cache is None:
        raise LlmoptError(f"{type(readout.model).__name__} keeps no cache of what it has read, so that what comes "
                          "after a prompt cannot be scored")
    found = []
    for piece in rest[:, :-1].split(every or rest.shape[1], 1):
        with nullcontext() if every else runtime.frozen(readout.model):
            found.append(readout.states(piece, past_key_values=cache, use_cache=True)[0])
    return torch.cat(found, 1)


def _every(model: nn.Module) -> int | None:
    """After how many decoded tokens the attached methods compress again; None: never."""
    live = runtime.attachment(model)
    methods = [] if live is None else [live.method(place) for place in (EVICTOR, STORE)]
    return min((method.every for method in methods if method is not None and method.every), default=None)


def unseen(model: nn.Module, length: int) -> str | None:
    """What to say where rows of `length` tokens are too short for the attached prefill selector to act; else None."""
    live = runtime.attachment(model)
    selector = None if live is None else live.method(ATTENTION)
    least = getattr(selector, "min_length", 0)
    if least <= length // 2:
        return None
    return (f"{selector.name} acts on prompts of {least:,} tokens and more; the rows that are scored have prompts of "
            f"{length // 2:,}, so it changes no score")
