"""How much of an error is left further on: of what weights that read one input lose, how much does their block lose.

    gain(u) = mean over tokens of |z' - z|^2 / |z|^2  over  sum of |(Q - W) x|^2 / sum of |W x|^2

Q: the weights of u rounded, all others dense; z: the block's output without that, z' with it. A softmax and a gate pass
on another share of an error of q, k, gate or up than a writer does of its own: readers and writers cannot be compared
by what they lose themselves.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import Visit, visits
from llmopt.method import Run
from llmopt.model.blocks import Projection

Rounded = Callable[[Projection], Tensor]                            # -> [out, in]


@torch.no_grad()
def gains(model: nn.Module, run: Run, rounded: Rounded) -> dict[str, float]:
    """The gain of each group of weights, by the name of its first one; a walk in which each block runs once for each.
    """
    sums: dict[tuple[str, str], float] = {}
    for visit in visits(model, run, "gains", edits=False, shared=True):
        dense = list(visit.outputs())
        for group in visit.block.groups():
            found = _errors(visit, group, rounded, dense)
            sums |= {(group[0].name, what): value for what, value in found.items()}
    total = run.ranks.totals(sums)
    return {name: total[name, "behind"] / total[name, "tokens"] * total[name, "all"] / max(total[name, "lost"], 1e-30)
            for name, what in total if what == "all"}


def _errors(visit: Visit, group: list[Projection], rounded: Rounded, dense: list[Tensor]) -> dict[str, float]:
    """Sums over the tokens: of energies at the group, all and lost, and of the shares that the block loses."""
    block, sums = visit.block, dict.fromkeys(("all", "lost", "behind", "tokens"), 0.0)
    changed = {p.key.removeprefix(f"{block.name}."): (p, rounded(p)) for p in group}

    def see(x: Tensor) -> None:
        for p, weight in changed.values():
            whole = p.weight.float()
            sums["all"] += float((x.float() @ whole.T).square().sum())
            sums["lost"] += float((x.float() @ (weight.float() - whole).T).square().sum())

    visit.observe({group[0].name: see})
    weights = {key: weight.T if p.transposed else weight for key, (p, weight) in changed.items()}
    for index, (before, mask) in enumerate(zip(dense, visit.masks, strict=True)):
        old, new = before[mask].float(), visit.forward(index, weights)[mask].float()                    # [N, E]
        shares = (new - old).square().sum(-1) / old.square().sum(-1).clamp(min=1e-30)
        sums["behind"], sums["tokens"] = sums["behind"] + float(shares.double().sum()), sums["tokens"] + len(shares)
    return sums
