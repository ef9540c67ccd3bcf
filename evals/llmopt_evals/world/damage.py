"""Two kinds of damage the reference model must feel: plain rounding, and FFN channels set to zero."""

import copy

import torch

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    """Symmetric rounding of [out, in] in groups along `in`: 2^bits levels, scale = 2 max|w| / (2^bits - 1)."""
    rows = weight.unflatten(1, (-1, group))
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 2 / (2**bits - 1)
    codes = (rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).flatten(1)


@torch.no_grad()
def rounded(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy with every linear inside the blocks rounded."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in BLOCK_LINEARS:
            module.weight.copy_(round_to_nearest(module.weight, bits))
    for stack in (p for p in model.parameters() if p.ndim == 3):        # experts
        stack.copy_(round_to_nearest(stack.flatten(0, 1), bits).view_as(stack))
    return model


@torch.no_grad()
def without_channels(model: torch.nn.Module, share: float, seed: int = 0) -> torch.nn.Module:
    """A copy with a random `share` of each block's FFN channels set to zero."""
    model = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            gone = torch.randperm(module.in_features, generator=random)[: int(share * module.in_features)]
            module.weight[:, gone] = 0
    for name, stack in model.named_parameters():
        if name.endswith("experts.down_proj"):
            for expert in stack:
                expert[:, torch.randperm(stack.shape[2], generator=random)[: int(share * stack.shape[2])]] = 0
    return model
