"""The codes that a solver of whole blocks begins with: those of a solver of single weights, group by group.

    slack of a weight = (H e^T)_i / (s H_ii),  e = w - s (c - z)            in steps of the grid, cut at -1/2 and 1/2

is how far from its code the best place of a weight lies, all others as they are (alternate.py goes to the nearest code
of it): where it is near one half, the next code would do nearly as well. Without data it is (w - s (c - z)) / s.
"""
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.calibration.inputs import Inputs, Moments, moments_of
from llmopt.calibration.walk import Visit
from llmopt.errors import naming
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.quant.grid import Spec
from llmopt.quant.solver import Solver

EDGE = 0.49         # of a step: the most that a weight begins away from its code where the data says its best place


@dataclass(frozen=True)
class Start:
    """A weight of a block with the codes that are to be made better; slack [out, in]: see above."""

    projection: Projection
    spec: Spec
    codes: Quantized
    slack: Tensor


@torch.no_grad()
def begin(visit: Visit, specs: Mapping[str, Spec], run: Run, solver: Solver) -> list[Start]:
    """The weights of a block that `specs` names; each group is solved behind the codes of those before it.

    The block is dense afterwards, as it was.
    """
    found, dense = [], []
    inputs = Inputs(solver.inputs, dense=solver.dense)
    weights = solver.token_weights(visit, run)
    for group in visit.block.groups():
        chosen = [p for p in group if p.name in specs]
        seen = moments_of(visit, group[0], inputs, weights, run) if chosen and solver.inputs != "none" else None
        for p in chosen:
            dense.append(p.weight.clone())
            with naming(p.name):
                found.append(_solved(p, specs[p.name], seen, solver))
        for start in found[len(found) - len(chosen):]:
            start.projection.write(start.codes.dequantize(start.projection.weight.dtype))
    for start, weight in zip(found, dense, strict=True):
        start.projection.write(weight)
    return found


def _solved(projection: Projection, spec: Spec, seen: Moments | None, solver: Solver) -> Start:
    aim = projection.weight.to(torch.float32, copy=True).contiguous()
    codes = solver.quantize(aim, seen, spec)                # which leaves in `aim` what it went for
    apart, scales = aim - codes.dequantize(spec.dtype).float(), codes.scales.float()
    if seen is not None:
        apart = (apart @ seen.hessian) / seen.hessian.diagonal().clamp(min=torch.finfo(apart.dtype).tiny)
    steps = apart.unflatten(1, (scales.shape[1], -1)) / scales.unsqueeze(-1)
    slack = steps.flatten(1).nan_to_num(0)
    if spec.live is not None:
        slack *= spec.live
    return Start(projection, spec, codes, slack if seen is None else slack.clamp(-EDGE, EDGE))
