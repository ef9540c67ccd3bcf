"""All blocks at once, behind the walk that has quantized them: what is learned of them, and how it is put into them."""
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import each
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.quant.grid import Spec
from llmopt.quant.latent import Gain, Held
from llmopt.quant.start import Start

LOSSES = "losses"           # among the tensors that were learned: before and after
Learn = Callable[[list[Held], list[Gain]], tuple[float, float]]


def learned(model: nn.Module, specs: Mapping[str, Spec], learn: Learn) -> dict[str, Tensor]:
    """By name, the codes and scales of the weights in `specs` and the gains of all blocks, as `learn` leaves them."""
    own = [p for block in blocks(model) for p in block.projections() if p.name in specs]
    latents = [Held(Start(p, specs[p.name], p.codes, torch.zeros(p.codes.codes.shape, device=p.weight.device)))
               for p in own]
    gains = [Gain(norm) for block in blocks(model) for norm in block.norms.values() if norm.weight is not None]
    losses = learn(latents, gains)
    found = {LOSSES: torch.tensor(losses, dtype=torch.float64)}
    for latent in latents:
        made, name = latent.result(), latent.projection.name
        found |= {f"{name}.codes": made.codes, f"{name}.scales": made.scales}
    return found | {gain.norm.name: gain.value().detach() for gain in gains}


@torch.no_grad()
def put(model: nn.Module, specs: Mapping[str, Spec], run: Run, found: Mapping[str, Tensor], label: str) -> None:
    """Write what was learned into the blocks, each of which is committed."""
    before, after = found[LOSSES].tolist()
    for block in each(model, run, label):
        for norm in block.norms.values():
            if norm.name in found:
                norm.module.weight.copy_(found[norm.name])
        for p in (p for p in block.projections() if p.name in specs):
            device, figures = p.weight.device, dict(p.codes.figures)
            figures.pop("weight_error", None)                                       # was that of other codes
            p.codes = replace(p.codes, codes=found[f"{p.name}.codes"].to(device),
                              scales=found[f"{p.name}.scales"].to(device),
                              figures=figures | {"kl_before": before, "kl": after})
            p.write(p.codes.dequantize(p.weight.dtype))
