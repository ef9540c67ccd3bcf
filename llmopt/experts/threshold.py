"""What a layer's experts are worth, and the threshold at which the wanted share of them is skipped: from data."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmopt.calibration.data import Batch
from llmopt.calibration.logits_loss import LogitsLoss, outputs
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import decoder
from llmopt.model.experts import Routed
from llmopt.runtime.gates import Left, gated, layers_with_experts

CANDIDATES = 256            # thresholds to choose from: as many quantiles of the scores


def first_batches(run: Run, tokens: int) -> list[Batch]:
    """This process's part of the calibration data, up to so many tokens in all; raises LlmoptError for no data."""
    if not run.batches:
        raise LlmoptError("this step needs calibration data and there is none")
    found, total = [], 0
    for batch in run.own_batches:
        if total * run.ranks.size < tokens:
            found.append(batch)
            total += int(batch["attention_mask"].sum())
    return found


@torch.no_grad()
def layer_weights(model: nn.Module, run: Run, batches: list[Batch]) -> dict[int, float]:
    """By layer with experts: a_l, the KL of the predictions without all of its routed experts, shares of the sum."""
    layers = [*layers_with_experts(model)]
    loss = LogitsLoss(model, batches, outputs(model, batches), dict)
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)
    sums[-1] = loss.tokens
    for place, layer in enumerate(run.progress(layers, "layers without their experts")):
        with gated(model, lambda at, given, layer=layer: given.weights * (at != layer)):
            sums[place] = loss.tokens * sum(float(loss(index)) for index in range(len(batches)))
    *kl, tokens = run.ranks.sum_(sums).tolist()
    alpha = [max(0.0, one / tokens) for one in kl]
    if not 0 < sum(alpha) < float("inf"):
        raise LlmoptError("without the experts of any layer the model predicts what it did, or no numbers: their "
                          "layers cannot be weighed; score: router does without")
    return {layer: one / sum(alpha) for layer, one in zip(layers, alpha, strict=True)}


@torch.no_grad()
def watched(model: nn.Module, batches: list[Batch], left: Left, see: Callable[[int, Routed, Tensor], None]) -> None:
    """Read the batches under `left`; see(layer, given, weights left) gets what is of real tokens."""
    def look(layer: int, given: Routed) -> Tensor:
        weights = left(layer, given)
        see(layer, Routed(*(part[real.to(part.device)] for part in given)), weights[real.to(weights.device)])
        return weights

    with gated(model, look):
        for batch in batches:
            real = batch["attention_mask"].flatten().bool()
            decoder(model)(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)


def skipped(model: nn.Module, run: Run, batches: list[Batch], left: Left) -> dict[int, float]:
    """By layer with experts: the share of the pairs of a real token and a chosen expert that is skipped."""
    layers = [*layers_with_experts(model)]
    counts = torch.zeros(len(layers), 2, dtype=torch.float64)

    def see(layer: int, given: Routed, weights: Tensor) -> None:
        counts[layers.index(layer)] += torch.tensor([float((weights == 0).sum()), weights.numel()])

    watched(model, batches, left, see)
    gone, all_ = run.ranks.sum_(counts).T.tolist()
    return {layer: one / total for layer, one, total in zip(layers, gone, all_, strict=True)}


def candidates(scores: Tensor) -> list[float]:
    """Thresholds in order, from one that nothing is below to one that everything is."""
    known = scores.double().unique()
    places = torch.linspace(0, len(known) - 1, min(len(known), CANDIDATES)).round().long()
    return [0.0, *known[places].tolist(), max(1.0, 2 * float(known[-1]))]


def bisected(share: Callable[[float], float], thresholds: list[float], ratio: float) -> float:
    """Of ascending thresholds the one whose share, which grows with it, comes nearest to `ratio`."""
    low, high = 0, len(thresholds) - 1
    if ratio in (0, 1):                     # of whatever is read later, too
        return thresholds[-int(ratio)]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(thresholds[middle]) < ratio else (low, middle)
    return min(thresholds[low], thresholds[high], key=lambda threshold: abs(share(threshold) - ratio))
