"""How much each block matters: LIM and ZD (Dumitru et al., arXiv:2406.17415), and measured sensitivity.

    LIM_l = - mean over tokens of cos(x_l, x_{l+1})     a block that turns the residual stream more matters more
    ZD_l  = |{w : (w - mean w) / std w > 1}| / N_l      over all weights of the block; SMALLER matters more
    D_l,b = mean over tokens of KL(dense || block l alone rounded to b bits)          the exact damage of each choice

The paper's official code is not public: cosine per token (not of the flattened sequence) is our reading of LIM, "z > 1"
(not |z| > 1) that of ZD. On small models LIM can be worse than chance; sensitivity is the one that holds.
"""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from llmopt.blocks import Block, blocks, walk
from llmopt.method import Progress, silent

LOGITS = 1 << 27    # dense log-probabilities kept for the sensitivity: at most this many (half a GiB)
TOKENS = 8192       # and of at most this many tokens: every entry of the table costs one forward pass over them


@torch.no_grad()
def lim(model: nn.Module, batches: list[dict[str, Tensor]], progress: Progress = silent) -> list[float]:
    """LIM of every block; one forward pass over the calibration set."""
    found, before, masks = [], None, []
    for visit in walk(model, batches, progress, "LIM"):
        if before is not None:
            found.append(modification(before, visit.inputs, masks))
        before, masks, last = visit.inputs, visit.masks, visit
    return [*found, modification(before, last.outputs(), masks)]


def modification(before: list[Tensor], after: list[Tensor], masks: list[Tensor]) -> float:
    """Minus the mean cosine between a block's inputs and outputs [B, T, E] over the real tokens."""
    total, count = 0.0, 0
    for x, y, mask in zip(before, after, masks, strict=True):
        cosine = torch.cosine_similarity(x[mask].float(), y[mask].float(), dim=-1)     # [N]
        total, count = total + float(cosine.double().sum()), count + len(cosine)
    return -total / count


def zd(model: nn.Module) -> list[float]:
    """ZD of every block, over the weights of all its projections."""
    return [share_above([p.weight for p in block.projections()]) for block in blocks(model)]


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


@torch.no_grad()
def sensitivity(model: nn.Module, batches: list[dict[str, Tensor]], widths: Iterable[int],
                rounded: Callable[[Block, int], dict[str, Tensor]], seed: int = 0,
                progress: Progress = silent) -> dict[int, dict[int, float]]:
    """{block: {bits: mean KL per token}} with that block alone rounded; `rounded` gives its weights [out, in] by name.

    Measured on calibration rows drawn by `seed`, as many as TOKENS and LOGITS allow.
    """
    rows = _sample(batches, seed, model.get_output_embeddings().weight.shape[0])
    dense = [_log_probs(model, row) for row in rows]
    table: dict[int, dict[int, float]] = {}
    for block in progress(blocks(model), "sensitivity"):
        kept = {p.name: p.weight.clone() for p in block.projections()}
        table[block.index] = {}
        for bits in widths:
            try:
                _fill(block, rounded(block, bits))
                table[block.index][bits] = _divergence(model, rows, dense)
            finally:
                _fill(block, kept)
    return table


def _fill(block: Block, weights: dict[str, Tensor]) -> None:
    for projection in block.projections():
        if projection.name in weights:
            projection.write(weights[projection.name])


def _sample(batches: list[dict[str, Tensor]], seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Single rows of the calibration set, in an order drawn by `seed`, up to TOKENS and LOGITS (at least one)."""
    rows = [{k: v[i:i + 1, :int(b["attention_mask"][i].sum())] for k, v in b.items()}
            for b in batches for i in range(len(b["input_ids"]))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, total, most = [], 0, min(TOKENS, LOGITS // vocabulary)
    for index in order:
        total += rows[index]["input_ids"].shape[1]
        if kept and total > most:
            break
        kept.append(rows[index])
    return kept


def _log_probs(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v.to(model.device) for k, v in row.items()}, use_cache=False).logits
    return logits[0].float().log_softmax(-1)                                           # [T, vocabulary]


def _divergence(model: nn.Module, rows: list[dict[str, Tensor]], dense: list[Tensor]) -> float:
    total, count = 0.0, 0
    for row, p in zip(rows, dense, strict=True):
        q = _log_probs(model, row)
        total += float((p.exp() * (p - q)).sum(-1).clamp(min=0).double().sum())
        count += len(p)
    return total / count
