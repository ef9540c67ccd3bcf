"""Whether tensors hold numbers, and types can hold them."""
import torch
from torch import Tensor

from llmopt.errors import LlmoptError


def all_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or Inf."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:                        # which aminmax does not know
        tensor = tensor.float()
    ends = torch.stack(tensor.aminmax())            # NaN comes through; much faster than isfinite, and takes no copy
    return bool(ends.isfinite().all())


def cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor in another type; raises LlmoptError for finite values that this type cannot hold."""
    made = tensor.to(dtype)
    if dtype == torch.float16 and made.dtype != tensor.dtype and not all_finite(made) and all_finite(tensor):
        raise LlmoptError(f"{where} reaches {tensor.abs().max().item():.3g}, and float16 ends at "
                          f"{torch.finfo(dtype).max:.0f}; use dtype: bfloat16 or float32")
    return made


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Raise LlmoptError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise LlmoptError(f"{source}: tensor {name} holds {bad} NaN or Inf values; the weights are damaged")
