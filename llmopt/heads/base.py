"""Head scores: one number per query head, kept in run.scores for the steps that follow, in JSON, and as a heat map."""
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration import probes
from llmopt.calibration.backward import undisturbed
from llmopt.calibration.data import amount
from llmopt.calibration.head_scores import check_scores
from llmopt.errors import FieldError, LlmoptError
from llmopt.files.json_shapes import finite
from llmopt.method import Method, Probe, Record, Run
from llmopt.model.blocks import blocks, decoder
from llmopt.model.head import logits_of

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HeadScore(Method):
    """Family base. The author writes `measure`; the model comes out of it unchanged.

    eats: what `measure` looks at, run.batches or run.probes; see ProbeScore.
    mean_over: what `measure` takes its mean over, so that processes can share the rows; None: each takes them all.
    beside: names of the figures that `measure` gives beside the scores. unit: what the scores count, for plots.
    """

    stage: ClassVar = "score"
    level: ClassVar = "run time"
    needs_whole: ClassVar[bool] = True
    eats: ClassVar[Literal["batches", "probes"]] = "batches"
    mean_over: ClassVar[Literal["samples", "tokens"] | None] = None
    beside: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = ""

    @property
    def needs_data(self) -> bool:
        return self.eats == "batches"

    @abstractmethod
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """{"scores": L tensors [H_l]}, larger meaning more of what is measured; empty where attention is skipped.

        Under the names in `beside`, as many tensors of what else the record tells of each head. One that goes through
        the blocks by walk.visits, without edits, sets needs_whole = False.
        """

    def finish(self, scores: list[Tensor]) -> list[Tensor]:
        """Turn the mean over all data into the scores; by default they are that mean."""
        return scores

    @property
    def meta_shape(self) -> dict:
        return {"scores": [[finite]], **{f"{name}?": [[finite]] for name in self.beside}, str: object}

    def apply(self, model: nn.Module, run: Run) -> Record:
        if self.needs_data and not run.batches:
            raise LlmoptError("head scores need calibration data and there is none")
        meta = run.memory.remember("scores", lambda: self._measured(model, run))
        for key in ("scores", *self.beside):
            name = self.name if key == "scores" else f"{self.name}.{key}"
            run.scores[name] = [torch.tensor(s, dtype=torch.float32) for s in meta[key]]
        return Record(meta=meta)

    def _measured(self, model: nn.Module, run: Run) -> dict[str, Any]:
        with undisturbed(model):
            found = self._mean(model, run)
        found["scores"] = self.finish(found["scores"])
        found = run.ranks.agree({key: [s.detach().float().cpu() for s in layers] for key, layers in found.items()})
        for layers in found.values():
            check_scores(layers, [block.heads for block in blocks(model)])
        return {"kind": self.name, **self._amount(run.batches, run.probes),
                **{key: [s.tolist() for s in layers] for key, layers in found.items()}}

    def _mean(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """`measure` over all data, of which each process sees its own rows."""
        if self.mean_over is None or run.ranks.size == 1:
            return self.measure(model, run)
        own = replace(run, batches=run.own_batches) if self.needs_data else replace(run, probes=run.own_probes)
        count = self._amount(own.batches, own.probes)[self.mean_over]
        if count:
            found = self.measure(model, own)
        else:                                       # fewer rows than processes
            zeros = [torch.zeros(block.heads, device=model.device) for block in blocks(model)]
            found = dict.fromkeys(("scores", *self.beside), zeros)
        share = count / sum(run.ranks.gather(count))
        return {key: [run.ranks.sum_(s.detach().double() * share) for s in layers] for key, layers in found.items()}

    def _amount(self, batches: list[Batch] | None, probes: list[Probe] | None) -> dict[str, int]:
        """{"samples", "tokens"} of what it looks at."""
        if self.needs_data:
            return amount(batches)
        return {"samples": len(probes), "tokens": sum(len(probe.ids) for probe in probes)}


@dataclass(frozen=True)
class ProbeScore(HeadScore):
    """A head score that looks at probes, run.probes; where mean_over is set, a process at its own."""

    eats: ClassVar = "probes"

    probe: str = Field("tokens", description="the questions: world, tokens (random ids, for any model) or FILE.jsonl")
    probes: int = Field(16, ge=1, le=10_000, description="how many of them")
    length: int = Field(256, ge=16, le=1_000_000, description="tokens of a context (world and tokens)")
    seed: int = Field(0, ge=0, lt=2**32, description="draws the probes")

    def check(self) -> None:
        if not probes.is_source(self.probe):
            raise FieldError("probe", self.probe, "world, tokens or a FILE.jsonl")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.probe,) if self.probe.endswith(".jsonl") else ()

    def chosen(self, model: nn.Module, run: Run) -> list[int]:
        """The indices of those run.probes that can be scored, in order; by default all."""
        return [*range(len(run.probes))]

    def apply(self, model: nn.Module, run: Run) -> Record:
        found = probes.load(self.probe, self.probes, self.length, self.seed, model.config, run.tokenizer)
        every = replace(run, probes=found)
        kept = run.memory.remember("accepted", lambda: {"probes": self._chosen(model, every)})["probes"]
        record = super().apply(model, replace(run, probes=[found[index] for index in kept]))
        record.meta["tried"] = len(found)
        return record

    def _chosen(self, model: nn.Module, run: Run) -> list[int]:
        with undisturbed(model):
            return run.ranks.agree(self.chosen(model, run))


def answer_logits(model: nn.Module, probe: Probe) -> Tensor:      # [n, V]
    """The model's logits in front of each token of the probe's answer; differentiable."""
    hidden = decoder(model)(input_ids=probe.ids[None].to(model.device), use_cache=False)[0][:, probe.asked]
    return logits_of(model, hidden)[0]


def single_rows(batches: list[Batch]) -> list[Batch]:
    """Batches of one row each, in order: no sample waits in memory for the longest one of its batch."""
    return [{key: row[None] for key, row in zip(batch, rows, strict=True)}
            for batch in batches for rows in zip(*batch.values(), strict=True)]


def plot(scores: list[Tensor], path: str | Path, title: str = "", unit: str = "score") -> None:
    """Draw the scores as a heat map, layers downwards; heads that are gone stay white. unit: of the colour bar."""
    figure_of(scores, title, unit).savefig(path, dpi=120)


def figure_of(scores: list[Tensor], title: str, unit: str) -> Any:
    """The matplotlib figure of the heat map."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = max(len(s) for s in scores)
    grid = torch.full((len(scores), max(1, width)), float("nan"))
    for layer, values in enumerate(scores):
        grid[layer, :len(values)] = values
    figure = Figure(figsize=(2 + 0.3 * grid.shape[1], 1.5 + 0.3 * grid.shape[0]), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid.numpy(), aspect="auto", cmap="viridis"), ax=axes, label=unit)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(title, wrap=True, parse_math=False)              # a model's name may hold dollar signs
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return figure
