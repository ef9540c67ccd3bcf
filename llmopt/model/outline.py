"""A model's shapes apart from the model itself: a copy without weights, on which steps hang codes without values."""
import copy

import torch
from torch import Tensor, nn

from llmopt.files import shards
from llmopt.model import expert_files
from llmopt.model.state import packs, plain_state
from llmopt.model.stored import packed_in_place, packed_weights
from llmopt.model.weights import coded


def outline(model: nn.Module) -> nn.Module:
    """The model's shapes on the meta device, those of its codes too."""
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
                               for p in model.parameters()}
    for codes in (weight.codes for weight in coded(model)):
        memo |= {id(t): t.to("meta") for t in (codes.codes, codes.scales, codes.zeros) if t is not None}
    return copy.deepcopy(model, memo)


def filed(skeleton: nn.Module, format: str) -> dict[str, Tensor]:
    """The tensors of the checkpoint that an outline with codes would make."""
    packing = packs(skeleton, format)
    tensors = plain_state(skeleton, renamed=not packing)
    return expert_files.filed(skeleton, packed_in_place(tensors, packed_weights(skeleton))) if packing else tensors


def filed_bytes(skeleton: nn.Module) -> int:
    """Bytes of the safetensors of that checkpoint, packed."""
    with torch.no_grad():
        return shards.file_bytes(filed(skeleton, "portable"))
