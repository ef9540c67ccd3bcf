"""The names by which a recipe can mean weights of a model: those of its modules, of experts' stacks and matrices."""
from torch import nn

from llmopt.model.blocks import blocks

KNOWN = "_llmopt_names"         # where a model that was cut short keeps the names of what it had


def names_of(model: nn.Module) -> list[str]:
    """All names, each once; of a model that was cut short those of the blocks that are gone, too."""
    found = [name for name, _ in model.named_modules() if name]
    found += [name for block in blocks(model) for p in block.of_experts() for name in (p.key, p.name)]
    return list(dict.fromkeys([*found, *vars(model).get(KNOWN, ())]))


def remember_names(model: nn.Module) -> None:
    """Keep the names before blocks are taken out to measure the others: a recipe may mean any of them."""
    vars(model)[KNOWN] = names_of(model)


def is_cut(model: nn.Module) -> bool:
    """True for a model some of whose names stand for nothing any more."""
    return KNOWN in vars(model)
