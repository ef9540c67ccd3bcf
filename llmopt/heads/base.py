"""Head scores: one number per query head, kept in run.scores for the steps that follow, in JSON, and as a heat map."""
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.data import amount
from llmopt.calibration.head_scores import check_scores
from llmopt.errors import LlmoptError
from llmopt.method import Method, Pace, Record, Run
from llmopt.model.blocks import blocks
from llmopt.progress import timed

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HeadScore(Method):
    """Family base. The author writes `score`; the model comes out of it unchanged.

    mean_over: what `score` takes its mean over, so that processes can share the rows; None: each takes them all.
    beside: names of the figures that `measure` gives beside the scores.
    """

    stage: ClassVar = "score"
    needs_data: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    mean_over: ClassVar[Literal["samples", "tokens"] | None] = None
    beside: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, model: nn.Module, run: Run) -> list[Tensor]:
        """L tensors [H_l], larger meaning more of what this score measures; empty where attention is skipped.

        One that goes through the blocks by walk.visits, without edits, sets needs_whole = False.
        """

    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """{"scores": what `score` gives}, and under the names in `beside` what else the record tells of each head."""
        return {"scores": self.score(model, run)}

    def finish(self, scores: list[Tensor]) -> list[Tensor]:
        """What becomes of the mean over all data."""
        return scores

    def apply(self, model: nn.Module, run: Run) -> Record:
        if not run.batches:
            raise LlmoptError("head scores need calibration data and there is none")
        meta = run.memory.remember("scores", lambda: self._measured(model, run))
        run.scores[self.name] = [torch.tensor(s, dtype=torch.float32) for s in meta["scores"]]
        return Record(meta=meta)

    def _measured(self, model: nn.Module, run: Run) -> dict[str, Any]:
        with undisturbed(model):
            found = self._mean(model, run)
        found["scores"] = self.finish(found["scores"])
        found = run.ranks.agree({key: [s.detach().float().cpu() for s in layers] for key, layers in found.items()})
        for layers in found.values():
            check_scores(layers, [block.heads for block in blocks(model)])
        return {"kind": self.name, **amount(run.batches),
                **{key: [s.tolist() for s in layers] for key, layers in found.items()}}

    def _mean(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """`measure` over all data, of which each process sees its own rows."""
        if self.mean_over is None or run.ranks.size == 1:
            return self.measure(model, run)
        count = amount(run.own_batches)[self.mean_over]
        if count:
            found = self.measure(model, replace(run, batches=run.own_batches))
        else:                                       # fewer rows than processes
            zeros = [torch.zeros(block.heads, device=model.device) for block in blocks(model)]
            found = dict.fromkeys(("scores", *self.beside), zeros)
        share = count / sum(run.ranks.gather(count))
        return {key: [run.ranks.sum_(s.detach().double() * share) for s in layers] for key, layers in found.items()}

    def seconds(self, model: nn.Module, run: Run, pace: Pace) -> float:
        """Of the whole model: the first batch for real, the others by their number of tokens."""
        if not self.needs_whole:
            return super().seconds(model, run, pace)
        first, total = run.batches[0]["input_ids"].numel(), sum(b["input_ids"].numel() for b in run.batches)
        spent = timed(self.apply, model, replace(run, batches=run.batches[:1]))
        return spent * total / first


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; modes and requires_grad come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def plot(scores: list[Tensor], path: str | Path) -> None:
    """Draw the scores as a heat map, layers downwards; heads that are gone stay white."""
    from matplotlib.figure import Figure

    width = max(len(s) for s in scores)
    grid = torch.full((len(scores), max(1, width)), float("nan"))
    for layer, values in enumerate(scores):
        grid[layer, :len(values)] = values
    figure = Figure(figsize=(2 + 0.3 * grid.shape[1], 1.5 + 0.3 * grid.shape[0]), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid.numpy(), aspect="auto", cmap="viridis"), ax=axes)
    axes.set(xlabel="head", ylabel="layer")
    figure.savefig(path, dpi=120)
