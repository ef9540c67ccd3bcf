"""The tensors of a model under the names of its files."""
from torch import Tensor, nn

from llmopt.model.modeling import tied
from llmopt.model.stay_packed import as_weights
from llmopt.model.weights import coded


def packs(model: nn.Module, format: str) -> bool:
    """True if the checkpoint will hold packed weights."""
    return format != "dense" and bool(coded(model))


def tied_names(model: nn.Module) -> set[str]:
    """The names of weights that are another's under a second name: an output head that is the embedding, or nothing.

    By the weights themselves: heads are tied by hand, and files hold another head than their config promises.
    """
    head = model.get_output_embeddings()
    if not tied(model):
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def plain_state(model: nn.Module, renamed: bool = True) -> dict[str, Tensor]:
    """The state dict under the names of the files, without the copies that tied weights make.

    renamed: False keeps the modules' own names: beside packed tensors transformers cannot collect a file's experts.
    """
    tied = tied_names(model)
    state = {k: v for k, v in as_weights(model, model.state_dict(), values=renamed).items() if k not in tied}
    return as_filed(model, state) if renamed else state


def as_filed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `model` under the names, and in the parts, that its files have."""
    from transformers.core_model_loading import revert_weight_conversion

    changed = revert_weight_conversion(model, state)
    return state if changed.keys() == state.keys() else changed         # where no name changes, the order must not
