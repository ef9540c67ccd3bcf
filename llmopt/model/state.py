"""The tensors of a model under the names of its files."""
from torch import Tensor, nn

from llmopt.model.weights import coded


def packs(model: nn.Module, format: str) -> bool:
    """Whether the checkpoint will hold packed weights."""
    return format != "dense" and bool(coded(model))


def plain_state(model: nn.Module, renamed: bool = True) -> dict[str, Tensor]:
    """The state dict under the names of the files, without the copies that tied weights make.

    renamed: False keeps the modules' own names: beside packed tensors transformers cannot collect a file's experts.
    """
    tied = set(model.all_tied_weights_keys)
    state = {k: v for k, v in model.state_dict().items() if k not in tied}
    return as_filed(model, state) if renamed else state


def as_filed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `model` under the names, and in the parts, that its files have."""
    from transformers.core_model_loading import revert_weight_conversion

    changed = revert_weight_conversion(model, state)
    return state if changed.keys() == state.keys() else changed         # where no name changes, the order must not
