"""Whether tensors hold numbers."""
import torch
from torch import Tensor

from llmopt.errors import LlmoptError


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    ends = torch.stack(tensor.aminmax())            # NaN comes through; much faster than isfinite, and takes no copy
    return bool(ends.isfinite().all())


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Raise LlmoptError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise LlmoptError(f"{source}: tensor {name} holds {bad} NaN or Inf values; the weights are damaged")
