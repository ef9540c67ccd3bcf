"""How much each block matters: LIM and ZD (Dumitru et al., arXiv:2406.17415).

    LIM_l = - mean over tokens of cos(x_l, x_{l+1})     a block that turns the residual stream more matters more
    ZD_l  = |{w : (w - mean w) / std w > 1}| / N_l      over all weights of the block; SMALLER matters more

The paper's official code is not public: cosine per token (not of the flattened sequence) is our reading of LIM, "z > 1"
(not |z| > 1) that of ZD. On small models LIM can be worse than chance.
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import each, visits
from llmopt.method import Run
from llmopt.model.blocks import layer_list


@torch.no_grad()
def lim(model: nn.Module, run: Run) -> list[float]:
    """LIM of every block; one forward pass over the calibration set."""
    found, before = [], None
    for visit in visits(model, run, "LIM", edits=False, shared=True):
        if before is not None:
            found.append(alignment(before.inputs, before.outputs_after_edit, visit.masks))
        before = visit
    found.append(alignment(before.inputs, before.outputs_after_edit, before.masks))
    shares = zip(*run.ranks.gather(found), strict=True)          # of one block after the other, by rank
    return [-sum(total for total, _ in block) / sum(count for _, count in block) for block in shares]


def alignment(before: list[Tensor], after: list[Tensor], masks: list[Tensor]) -> tuple[float, int]:
    """(sum of the cosines between a block's inputs and outputs [B, T, E], count) over the real tokens."""
    total, count = 0.0, 0
    for x, y, mask in zip(before, after, masks, strict=True):
        cosine = torch.cosine_similarity(x[mask].float(), y[mask].float(), dim=-1)     # [N]
        total, count = total + float(cosine.double().sum()), count + len(cosine)
    return total, count


def zd(model: nn.Module, run: Run) -> list[float]:
    """ZD of every block, over the weights of all its projections."""
    own = run.ranks.share(range(len(layer_list(model))))
    found = [share_above([p.weight for p in b.projections()]) for b in each(model, run, "ZD", edits=False, only=own)]
    return [share for part in run.ranks.gather(found) for share in part]


@torch.no_grad()
def share_above(weights: Iterable[Tensor]) -> float:
    """Share of all entries more than one standard deviation above the mean; float64, one tensor at a time."""
    weights = list(weights)
    count = sum(w.numel() for w in weights)
    if not count:
        return 0.0
    mean = sum(float(w.double().sum()) for w in weights) / count
    variance = sum(float((w.double() - mean).square().sum()) for w in weights) / count
    if variance <= (1e-12 * mean) ** 2:
        return 0.0
    return sum(int((w.double() - mean > variance ** 0.5).sum()) for w in weights) / count
