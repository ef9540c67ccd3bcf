"""The whole contract between llmopt and a method: two verbs, apply and restore.

A method is a frozen dataclass whose fields ARE the keys of its recipe entry. `apply` edits a model in place and
returns a `Record`; `restore` redoes the edit on a model that was loaded from disk.
"""
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from llmopt.files.json_shapes import check_shape
from llmopt.model.head_numbers import HeadNumbers
from llmopt.model.levels import Level
from llmopt.parts import Part
from llmopt.progress import Progress, silent
from llmopt.scale.memory import Memory
from llmopt.scale.processes import Ranks

Stage = Literal["score", "prune", "transform", "quant", "runtime"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)  # the order in which the steps of a recipe must come
FILES = (".json", ".safetensors")      # of head scores
UNCHANGED = ("score", "runtime")        # stages whose steps leave the weights as they are


@dataclass
class Record:
    """All that load time needs of one step: plain JSON data and tensors."""

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A question about a context, as token ids [n] each; corrupted: the context without the answer, as many tokens."""

    context: Tensor
    question: Tensor
    answer: Tensor
    corrupted: Tensor | None = None

    @property
    def ids(self) -> Tensor:                        # [T]
        """Context, question and answer, as the model reads them."""
        return torch.cat([self.context, self.question, self.answer])

    @property
    def asked(self) -> slice:
        """The places in `ids` of the queries that predict the answer: the token in front of each of its tokens."""
        last = len(self.ids) - 1
        return slice(last - len(self.answer), last)

    @property
    def needle(self) -> Tensor | None:              # [n]
        """The places in `ids` where the context states the answer; None where it does not literally.

        Of several, the last one where the corrupted context differs, or the last of all.
        """
        windows = self.context.unfold(0, len(self.answer), 1) if len(self.answer) <= len(self.context) else None
        found = [] if windows is None else (windows == self.answer).all(1).nonzero().flatten()[:, None]
        if len(found) == 0:
            return None
        places = found + torch.arange(len(self.answer))                                     # [windows, n]
        if self.corrupted is not None:
            stated = (self.context != self.corrupted)[places].any(1)
            places = places[stated] if bool(stated.any()) else places
        return places[-1]


@dataclass(frozen=True)
class Replayed:
    """A text that was read twice: ids [n]; by layer, the largest attention on each entry the second time [G, n].

    protected: (first, last) entries that are kept whatever their score. slid: by layer, how many of the first entries
    had left its window when the text was read.
    """

    ids: Tensor
    scores: list[Tensor]
    protected: tuple[int, int]
    slid: list[int]

    def free(self, layer: int) -> slice:
        """The entries of a layer that are there after the text and may go."""
        first, last = self.protected
        start = max(first, self.slid[layer])
        return slice(start, max(start, len(self.ids) - last))

    def sizes(self) -> Tensor:
        """[G of all layers] how many of each KV head's entries may go."""
        free = [self.free(layer) for layer in range(len(self.scores))]
        return torch.cat([torch.full((len(layer),), part.stop - part.start) for layer, part in
                          zip(self.scores, free, strict=True)])


@dataclass
class Run:
    """The context of a step that is being applied.

    batches: [{"input_ids": [B, T], "attention_mask": [B, T]}, ...], right-padded, or None.
    probes: what head scores of `eats` "probes" look at; see calibration.probes.
    scores: head scores by step name: L tensors of [H_l], float32. heads: once pruning has taken some, which are left.
    replays: what heads.replay has read twice, for the kv methods that learn from it.
    ahead: the steps to come, so that this one can leave what they need.
    memory: go through the blocks with walk.each and walk.visits, which bring in their weights.
    layers: blocks of the whole model, where a rehearsal has but one of them.
    dense: where a step `recalls`, what the decoder of the model as it was opened gives for each batch, [B, T, E].
    ranks: the processes that share this run. A step must leave the same model and record on all of them.
    """

    batches: list[dict[str, Tensor]] | None = None
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    heads: HeadNumbers | None = None
    seed: int = 0
    progress: Progress = silent
    ahead: tuple["Method", ...] = ()
    tokenizer: Any = None
    memory: Memory = field(default_factory=Memory)
    ranks: Ranks = field(default_factory=Ranks)
    probes: list[Probe] | None = None
    replays: list[Replayed] | None = None
    layers: int | None = None
    dense: list[Tensor] | None = None

    @cached_property
    def own_batches(self) -> list[dict[str, Tensor]]:
        """This process's part of the batches: what is summed over them must be summed over the ranks, counts too."""
        return self.ranks.share_batches(self.batches)


    @property
    def own_probes(self) -> list[Probe]:
        """This process's part of the probes."""
        return self.ranks.share(self.probes)


class Sample(NamedTuple):
    """A run with a part of its data; the whole takes `times` as long. what: the part, in words."""

    run: Run
    times: float
    what: str


class Method(Part, ABC):
    """One entry of a recipe. Subclasses are frozen pydantic dataclasses registered under `family.method`."""

    kind = "method"
    stage: ClassVar[Stage]
    place: ClassVar[str] = ""                # what a recipe has at most one of, in words; nothing: as many as it likes
    needs_data: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False     # True: all weights at once, so that it cannot run block by block
    recalls: ClassVar[bool] = False         # True: it asks what the model predicted before any step, see Run.dense
    level: ClassVar[Level] = "structure"    # what it must know of a model, see model/levels.py
    meta_shape: ClassVar[Any] = {str: object}       # of its record's meta, in the words of files/json_shapes.py

    @property
    def scored_by(self) -> str | None:
        """The head scores that its field `heads` names: a score step, or a file."""
        heads = getattr(self, "heads", None)
        return heads if isinstance(heads, str) else None

    def check_scores(self, scores: list[Tensor], model) -> None:
        """Raise LlmoptError for head scores [H_l] by layer of `model`, those it is `scored_by`, that it cannot use.

        Asked as soon as they are known, before steps that take long.
        """

    @property
    def reads(self) -> tuple[str, ...]:
        """Files that its fields name: a resumed run must find them as they were."""
        heads = self.scored_by
        return (heads,) if heads and heads.endswith(FILES) else ()

    @property
    def asks(self) -> tuple[str, ...]:
        """Score steps that must come before it: the one that its field `heads` names."""
        heads = self.scored_by
        return (heads,) if heads and not heads.endswith(FILES) else ()

    @property
    def multiple(self) -> int:
        """Columns that must go evenly into every width it finds; steps before it keep to that."""
        return 1

    def rounders(self, model) -> dict[str, Callable[[Tensor], Tensor]]:
        """By the name of each weight that it will round: what maps [out, in] to the nearest points of its grid.

        For steps before it, which prepare the weights.
        """
        return {}

    def backward(self, rows: int, length: int) -> int:
        """Tokens at least through whose blocks it takes gradients at once, in batches of rows x length; 0: none."""
        return 0

    def learned_numbers(self, model) -> int:
        """Numbers that it learns by Adam on the whole model; 0: none."""
        return 0

    def sample(self, run: Run) -> Sample:
        """A part of the data for which a step that needs_whole takes as much memory as for all: its largest batch."""
        if not run.batches:
            return Sample(run, 1, "all")
        sizes = [batch["input_ids"].numel() for batch in run.batches]
        largest = run.batches[sizes.index(max(sizes))]
        return Sample(replace(run, batches=[largest]), sum(sizes) / max(sizes), f"largest of {len(sizes)} batches")

    def sketch(self, skeleton, run: Run, source=None) -> str:
        """Make the same edit on the shapes of a model, its weights on the meta device; a sentence on what it will do.

        run.memory: at this step, so that a decision which is remembered here is not taken again by `apply`.
        source: the model that the step will find, where no step before it changes weights; else None.
        """
        return ", ".join(f"{key} {value}" for key, value in self.to_dict()[self.name].items() if value is not None)

    @abstractmethod
    def apply(self, model, run: Run) -> Record:
        """Edit `model` in place and return what load time needs."""

    def check_meta(self, meta: dict[str, Any]) -> None:
        """Raise LlmoptError unless the meta of a record, from a file that anybody may have written, has its shape."""
        check_shape(meta, self.meta_shape, f"{self.name}: meta")

    def restore(self, model, record: Record) -> None:
        """Redo the edit on a model loaded from disk; nothing, where config and weights already carry it."""
