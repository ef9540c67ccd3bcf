"""The mark of a model in memory whose weights are being edited, so that one left half-way does not pass for whole."""
from typing import Any

from torch import nn

from llmopt.errors import LlmoptError

KEY = "_llmopt_unfinished"              # in the model's __dict__: False while steps edit it, True once they failed


def begin(model: nn.Module) -> None:
    """Note that the model's weights are about to be edited."""
    model.__dict__.setdefault(KEY, False)


def finish(model: nn.Module) -> None:
    """Note that the model is whole again."""
    model.__dict__.pop(KEY, None)


def abandon(model: nn.Module) -> bool:
    """Let a model that has been edited in part refuse to run from now on; False if nothing was edited."""
    if KEY not in model.__dict__:
        return False
    model.__dict__[KEY] = True
    model.register_forward_pre_hook(_refuse)
    return True


def check_finished(model: nn.Module) -> None:
    """Raise LlmoptError for a model that an error has left between its old weights and its new ones."""
    if model.__dict__.get(KEY):
        raise LlmoptError("llmopt.compress was cut off and has left this model half-edited; load it again")


def _refuse(model: nn.Module, given: Any) -> None:
    check_finished(model)
