"""How much each block matters: LIM and ZD (Dumitru et al., arXiv:2406.17415), and measured sensitivity.

    LIM_l = - mean over tokens of cos(x_l, x_{l+1})     a block that turns the residual stream more matters more
    ZD_l  = |{w : (w - mean w) / std w > 1}| / N_l      over all weights of the block; SMALLER matters more
    D_u,b = mean over tokens of KL(dense || unit u rounded to b bits, the others to the width above the target)

The paper's official code is not public: cosine per token (not of the flattened sequence) is our reading of LIM, "z > 1"
(not |z| > 1) that of ZD. On small models LIM can be worse than chance. Sensitivity beat uniform bits wherever it was
measured but once (GPTQ at 3 bits on stories260K: .464 against .448 nats). Its units are the projections that read one
input (q k v | o | gate up | down). Damage grows faster than its parts add up, so a unit measured in a dense model looks
more robust than it is among others that are rounded too.
"""
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import each, visits
from llmopt.method import Run
from llmopt.model.blocks import Projection, layer_list
from llmopt.scale.room import Scene

LOGITS = 1 << 27    # dense log-probabilities kept for the sensitivity: at most this many (half a GiB)
TOKENS = 2048       # and of at most this many tokens: every entry of the table costs one forward pass over them


@torch.no_grad()
def lim(model: nn.Module, run: Run) -> list[float]:
    """LIM of every block; one forward pass over the calibration set."""
    found, before = [], None
    for visit in visits(model, run, "LIM", edits=False, shared=True):
        if before is not None:
            found.append(alignment(before.inputs, before.left, visit.masks))
        before = visit
    found.append(alignment(before.inputs, before.left, before.masks))
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


class Trial:
    """The KL of a model to its dense self with the weights of each unit at bits of choice; ends with `restore`.

    units: {name: projections that share their bits}; `rounded(name, weight, bits)` gives a weight [out, in]. Keeps a
    copy of the units' weights, and logits of as many calibration rows, drawn by `seed`, as TOKENS and LOGITS allow.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], units: dict[str, list[Projection]],
                 rounded: Callable[[str, Tensor, int], Tensor], seed: int = 0):
        self.model, self.units, self.rounded = model, units, rounded
        self.rows = sample(batches, seed, model.get_output_embeddings().weight.shape[0])
        self.dense = [_log_probs(model, row) for row in self.rows]
        self.kept = {p.name: p.weight.clone() for unit in units.values() for p in unit}

    def of(self, bits: Mapping[str, int]) -> float:
        """Mean KL(dense || these units at these bits, the rest as it is) per token, in nats."""
        self.set(bits)
        total, count = 0.0, 0
        for row, p in zip(self.rows, self.dense, strict=True):
            q = _log_probs(self.model, row)
            total += float((p.exp() * (p - q)).sum(-1).clamp(min=0).double().sum())
            count += len(p)
        return total / count

    def restore(self) -> None:
        """Write the dense weights back."""
        for unit in self.units.values():
            for projection in unit:
                projection.write(self.kept[projection.name])

    def set(self, bits: Mapping[str, int]) -> None:
        """Write the weights of these units, rounded."""
        for unit, width in bits.items():
            for projection in self.units[unit]:
                projection.write(self.rounded(projection.name, self.kept[projection.name], width))


@torch.no_grad()
def sensitivity(trial: Trial, widths: Iterable[int], company: int, run: Run) -> dict[str, dict[int, float]]:
    """{unit: {bits: KL}}, each unit in turn at each width, all the others at `company` bits."""
    level, table = run.ranks.agree(trial.of(dict.fromkeys(trial.units, company))), {}
    for unit in run.progress(run.ranks.share(list(trial.units)), "sensitivity"):
        others = [bits for bits in widths if bits != company]
        table[unit] = {bits: trial.of({unit: bits}) for bits in others} | {company: level}
        trial.set({unit: company})
    return {unit: row for part in run.ranks.gather(table) for unit, row in part.items()}


def sample(batches: list[dict[str, Tensor]], seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
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


def kept_bytes(vocabulary: int, tokens: int) -> int:
    """Bytes of the log-probabilities of a trial, and of one more set to compare them with."""
    return 2 * 4 * vocabulary * min(tokens, TOKENS, LOGITS // vocabulary)


def trial_bytes(vocabulary: int, scene: Scene) -> int:
    """Bytes of the log-probabilities that a trial keeps, and of what comparing one row with them takes."""
    longest = scene.largest[1]
    kept = min(scene.tokens, max(longest, min(TOKENS, LOGITS // vocabulary)))
    return 4 * vocabulary * (kept + 4 * longest)


def _log_probs(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v.to(model.device) for k, v in row.items()}, use_cache=False).logits
    return logits[0].float().log_softmax(-1)                                           # [T, vocabulary]
