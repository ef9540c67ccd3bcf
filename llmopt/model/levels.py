"""How much of llmopt works on a model: three levels, each of which holds the ones before.

    weights     quantization, blocks that leave: every causal LM whose decoder layers are one list of modules
    run time    heads.*, kv.*, attention.*: models whose attention goes through transformers' attention interface
    structure   widths and heads that leave, transforms: architectures with an entry in the table (architectures.py)
"""
from typing import Literal

from torch import nn

from llmopt.errors import LlmoptError
from llmopt.model.architectures import NO_ENTRY
from llmopt.model.blocks import spec_of

Level = Literal["weights", "run time", "structure"]
NOT_SEEN = "its attention is known to models with an entry in the table alone"


def lacking(model: nn.Module) -> dict[Level, str | None]:
    """By level, why it does not hold; None: it does. Raises LlmoptError for a model on which nothing works."""
    if spec_of(model).known:
        return {"weights": None, "run time": None, "structure": None}
    return {"weights": None, "run time": NOT_SEEN, "structure": NO_ENTRY}


def described(model: nn.Module) -> str:
    """The levels in a line: which holds, and why not the next."""
    found = lacking(model)
    return "; ".join([max((level for level in found if found[level] is None), key=[*found].index),
                      *(f"not {level}: {reason}" for level, reason in found.items() if reason)])


def refuse_below(model: nn.Module, level: Level, what: str) -> None:
    """Raise LlmoptError unless `level`, which `what` takes, holds for the model."""
    if reason := lacking(model)[level]:
        raise LlmoptError(f"{model.config.model_type}: {what} takes the level {level!r}, and it has none: {reason}")
