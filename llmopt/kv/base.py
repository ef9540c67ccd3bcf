"""Base of the kv methods: how much is kept, by whom, and what is always kept. A method writes `score` alone."""
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.kv.allocate import ranks
from llmopt.kv.allocators import Allocator, Demand, Room, Scored, Uniform, stack
from llmopt.kv.reducers import Evict, Reducer
from llmopt.kv.structure import demoted, frequent_marks
from llmopt.kv.view import LayerKV, Source, index_of_real, look_up
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks
from llmopt.model.positions import refuse_turned
from llmopt.parts import fields_of
from llmopt.runtime.attach import CacheMethod
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import Entries
from llmopt.runtime.compression import fold
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.replay import highest_scores


class Turn(NamedTuple):
    """One compression of one batch row: the cache, what is attached, what the method has recorded, which row."""

    cache: LlmoptCache
    live: Attachment
    record: Record
    row: int

    @property
    def length(self) -> int:
        """Real tokens seen."""
        return self.cache.lengths()[self.row]

    def entries(self, index: int) -> Entries:
        """The row's entries of one layer, real tokens only."""
        return self.cache.layers[index].row(self.row, self.cache.real(self.row))


class Choice(NamedTuple):
    """The choice in one layer of one row: bool [G, T] the entries that stay, and what they were judged by."""

    keep: Tensor
    scored: Scored


@dataclass(frozen=True)
class Scorer(CacheMethod):
    """Keep the entries of highest score; exactly one of `ratio` and `budget` is set.

    Per row of the batch, with n real tokens seen, a KV head keeps on average
    min(n, max(minimum, n - floor(ratio * n))) or min(n, budget) entries. learns: its `learn` runs the model, on the
    texts that heads.replay has read. turns: it looks at keys or queries as they are before RoPE.
    """

    learns: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    ratio: float | None = Field(None, ge=0, lt=1, description="fraction removed")
    budget: int | None = Field(None, ge=1, description="mean entries per KV head, sinks and window included")
    minimum: int = Field(7, ge=1, description="floor of any one head")
    sinks: int = Field(0, ge=0, description="first tokens, always kept")
    window: int = Field(0, ge=0, description="last tokens, always kept")
    protect: float = Field(0.0, ge=0, le=0.5, description="part of a head's budget for each end of the text")
    demote: float = Field(1.0, ge=0, le=1, description="factor on scores of frequent punctuation and white space")
    allocate: Allocator = Field(Uniform(), description="how many entries each KV head keeps")
    heads: str | None = Field(None, description="head scores: name of a score step, or a .json or .safetensors file")
    every: int | None = Field(None, ge=1, description="compress again after so many tokens of decoding")
    reduce: Reducer = Field(Evict(), description="what becomes of the others")

    def check(self) -> None:
        if (self.ratio is None) == (self.budget is None):
            raise FieldError("ratio", self.ratio, "exactly one of ratio and budget", "; such as ratio=0.5")
        if self.budget is not None and self.budget < max(1, self.sinks + self.window):
            raise FieldError("budget", self.budget, f"at least sinks + window = {self.sinks} + {self.window}")
        if self.heads is None and self.allocate.reads_heads and not self.allocate.usual_heads \
                or self.heads is not None and not self.allocate.reads_heads:
            raise FieldError("heads", self.heads, "head scores together with allocate: heads, and only then,")

    @abstractmethod
    def score(self, kv: LayerKV) -> Tensor:
        """The worth of every entry: [B, G, T], higher is better. Holes may hold anything."""

    def replay(self, ids: Tensor, record: Record) -> Iterator[Tensor]:
        """What is read again before entries are dropped, where `replays` is set: token ids int64 [t], chunk by chunk.

        ids: int64 [n], the real tokens seen by one row. Every chunk is read on a copy of the cache, behind all that it
        holds; `score` is asked once for each, with the chunk's queries in `kv.queries` (as many as `queries()` says;
        None: all), and the highest score of an entry counts.
        """
        yield ids

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        """Columns [B, G, T] that the entries carry from now on, through eviction, beams and turns; scores: [B, G, T].

        At the next compression `kv.carried[name]` has them again, 0 for entries that are new. A column of another name
        stays as it is.
        """
        return {}

    @property
    def asks(self) -> tuple[str, ...]:
        usual = (self.allocate.usual_heads,) if self.allocate.usual_heads and self.heads is None else ()
        return (*super().asks, *usual, *(("heads.replay",) if self.learns or self.allocate.learns else ()))

    @property
    def layer_by_layer(self) -> bool:
        """True if a layer's entries can be chosen without the scores of later layers."""
        return self.allocate.looks_at != "model" and not self.replays

    @property
    def needs_data(self) -> bool:
        return self.demote < 1

    @property
    def needs_whole(self) -> bool:
        return self.learns or self.allocate.learns

    def backward(self, rows: int, length: int) -> int:
        return self.allocate.backward(rows, length)

    @property
    def reads_ids(self) -> bool:
        return self.demote < 1

    def share(self, length: int) -> int:
        """Mean entries per KV head after `length` real tokens."""
        if self.budget is not None:
            return min(length, self.budget)
        return min(length, max(self.minimum, length - int(self.ratio * length)))

    @property
    def first(self) -> int:
        """First tokens that every head keeps."""
        return max(self.sinks, self.allocate.sinks)

    # ------------------------------------------------------------------------------------------ once, at apply

    def sample(self, run: Run) -> Sample:
        texts = run.replays or []
        return Sample(replace(run, replays=texts[:1]), max(1, len(texts)), f"first of {len(texts)} texts")

    def learn(self, model: nn.Module, run: Run) -> Record:
        """What the scorer decides once, by `scoring` alone: methods that differ in other fields may share it."""
        return Record()

    def refuse(self, model: nn.Module) -> None:
        """Raise LlmoptError for a model that does not show what this method looks at."""
        if self.turns or self.reduce.turns:
            refuse_turned(model)

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        self.refuse(skeleton)
        return super().sketch(skeleton, run, source)

    def plan(self, model: nn.Module, run: Run) -> Record:
        self.refuse(model)
        return self.planned(self.learn(model, run), model, run)

    def check_scores(self, scores: list[Tensor], model: nn.Module) -> None:
        self.allocate.check_scores(self, scores)

    def planned(self, learned: Record, model: nn.Module, run: Run) -> Record:
        """What the scorer has learned, and beside it what the allocator has decided on its scores."""
        record = replace(learned, meta=dict(learned.meta))
        if self.demote < 1:
            record.meta["structure"] = frequent_marks(run.batches, run.tokenizer)
        record.meta |= self.allocate.plan(self, record, model, run)
        return record

    @property
    def meta_shape(self) -> dict:
        marks = {"structure": [int]} if self.demote < 1 else {}
        return {**marks, **self.allocate.meta_shape, str: object}

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        self.allocate.check_meta(record.meta, [view.kv_heads for view in blocks(model)], self.name)

    # --------------------------------------------------------------------- after a forward, or a layer's attention

    @torch.no_grad()
    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        turns = [Turn(cache, live, record, row) for row in range(cache.batch_size)]
        chosen = [self._choose(turn, layers) for turn in turns]
        if all(row is None for row in chosen) and not self._carries:
            return                                       # the queries stay too: they vote when there is a choice
        done = None if self._carries else torch.tensor([row is not None for row in chosen])
        for place, index in enumerate(layers):
            fold(live, cache, index, [self._left(turn, index, None if row is None else row[place])
                                      for turn, row in zip(turns, chosen, strict=True)])
            cache.layers[index].forget_queries(self._retained, done)        # the others' wait until there is a choice

    @property
    def _carries(self) -> bool:
        """True if entries take down what each turn's queries made of them, so that no turn may go by unnoticed."""
        return type(self).carry is not Scorer.carry and not self.replays

    @property
    def _retained(self) -> int:
        """Queries that must outlive a compression so that the next one, `every` tokens later, sees enough of them."""
        return 0 if self.every is None or self.queries() is None else max(0, self.queries() - self.every)

    def _left(self, turn: Turn, index: int, choice: Choice | None) -> Entries:
        """The entries of one layer and row after the reducer; all of them, if there is no choice to be made."""
        entries = turn.entries(index)
        if choice is None and self._carries and self._has_voters(turn, index):
            choice = Choice(entries.positions >= 0, self._scored(turn, index))
        if choice is None:
            return entries
        entries = replace(entries, carried=entries.carried | choice.scored.carried)
        left = self.reduce.reduce(view_of(turn, index, entries), entries, choice.keep, choice.scored.scores)
        return left.traced_from(entries)

    def _choose(self, turn: Turn, layers: list[int]) -> list[Choice] | None:
        """The entries of a row that stay, per layer; None: all of them."""
        share = self.share(turn.length)
        caps = self._coming(turn)
        if all(bool((caps[i] <= share).all()) for i in (layers if self.allocate.looks_at == "layer" else caps)):
            return None
        if not all(self._has_voters(turn, index) for index in layers):
            return None
        scored = self.scores_of(turn, layers)
        counts = self._counts(scored, turn, share, layers)
        return [Choice(self._keep(layer, count[:len(layer.scores)], turn.length), layer)
                for layer, count in zip(scored, counts, strict=True)]

    def scores_of(self, turn: Turn, layers: list[int]) -> list[Scored]:
        """The scores of a row's entries, layer by layer; the context is read again for them where `replays` is set."""
        replayed = self._replayed(turn) if self.replays and not turn.live.now.rehearsing else {}
        return [self._scored(turn, index, replayed.get(index)) for index in layers]

    def _has_voters(self, turn: Turn, index: int) -> bool:
        """True if a real query of this row waits in a layer, or the method asks for none."""
        layer, real = turn.cache.layers[index], turn.cache.real(turn.row)
        if self.queries() == 0 and not self.hidden or self.replays or turn.live.now.rehearsing:
            return True
        if layer.queries is None:
            return False
        return real is None or bool(_are_real(layer.query_positions[turn.row], real).any())

    def _coming(self, turn: Turn) -> dict[int, Tensor]:
        """Entries of every layer at the end of this forward if nothing were dropped, by layer: [G]."""
        cache, real = turn.cache, turn.cache.real(turn.row)
        total = cache.get_seq_length(cache.attending()[0])
        return self._once(turn, "coming", lambda: {index: cache.layers[index].coming(real, turn.row, total)
                                                   for index in cache.attending()})

    @staticmethod
    def _once(turn: Turn, name: str, compute: Callable[[], Any]) -> Any:
        """What is decided for a row of the batch once in a forward, by whichever layer asks first."""
        plan = turn.live.now.plan
        if (turn.row, name) not in plan:
            plan[turn.row, name] = compute()
        return plan[turn.row, name]

    def _replayed(self, turn: Turn) -> dict[int, Tensor]:
        """By layer, the highest scores [1, G, T] over all that is read again; copies of a cache read it again once."""
        found, key = turn.live.now.replayed, (turn.row, *self.scoring)
        if key not in found:
            found[key] = self._read_again(turn)
        return found[key]

    @property
    def scoring(self) -> tuple[Any, ...]:
        """Its name, and the values of the fields that scores depend on: not those of who keeps how much."""
        return (self.name, *(getattr(self, key) for key in fields_of(self) if key not in fields_of(Scorer)))

    def _read_again(self, turn: Turn) -> dict[int, Tensor]:
        real, ids = turn.cache.real(turn.row), turn.cache.ids[turn.row]
        chunks = self.replay(ids if real is None else ids[real.to(ids.device)], turn.record)

        def score(copy: LlmoptCache, index: int) -> Tensor:
            view = view_of(turn._replace(cache=copy, row=0), index, turn.entries(index))
            return self.score(replace(view, lengths=torch.tensor([turn.length]), tail=copy.layers[index].keys))

        return highest_scores(turn.live, turn.cache, turn.row, chunks, score)

    def _scored(self, turn: Turn, index: int, scores: Tensor | None = None) -> Scored:
        """One layer's scores, [1, G, T] if they are known; raises LlmoptError if the method gave NaN."""
        view = view_of(turn, index, turn.entries(index))
        if view.positions.shape[-1] == 0:               # nothing but padding in this layer's window
            return Scored(view.positions[0].float(), view.positions[0], {})
        if turn.live.now.rehearsing:                    # no weight is there to be read
            scores = torch.rand(view.positions.shape, generator=torch.Generator().manual_seed(index))
        elif scores is None:
            scores = self.score(view)
        carried = {name: column[0] for name, column in self.carry(view, scores).items()}
        scores = scores[0].float().masked_fill(view.holes[0], -torch.inf)
        if bool(scores.isnan().any()):
            raise LlmoptError(f"{self.name}: NaN scores in layer {index}")
        if self.demote < 1 and not turn.live.now.rehearsing:
            places = turn.entries(index).positions
            ids = look_up(turn.cache.ids[turn.row].to(places.device), places)
            scores = demoted(scores, ids, turn.record.meta["structure"], self.demote)
        return Scored(scores, view.positions[0], carried)

    def _counts(self, scored: list[Scored], turn: Turn, share: int, layers: list[int]) -> Tensor:
        """[layers, G] entries that each head keeps."""
        if self.allocate.looks_at == "nothing":
            counts = self._once(turn, "counts", lambda: self._from_lengths(turn, share))
            return counts[[turn.cache.attending().index(i) for i in layers]]
        cap, mean = stack([layer.counts for layer in scored], 0).cpu(), torch.tensor(share)
        sight = self._in_sight(turn, layers)
        sure = self._sure(turn, sight)
        demand = Demand(share, cap, sight.clamp(max=share), sure.clamp(min=self.minimum), sure, scored,
                        lambda layer: self._protected(layer, mean, turn.length))
        return self.allocate.counts(demand)

    def _from_lengths(self, turn: Turn, share: int) -> Tensor:
        """[attending layers, G]: budgets that no score of this prompt changes, from the lengths of all layers."""
        caps, sight = self._coming(turn), self._in_sight(turn, turn.cache.attending())
        even, sure = sight.clamp(max=share), self._sure(turn, sight)
        weights = self.allocate.weights(turn.record.meta, [*caps], Room(sight - sure, sure, int(even.sum())))
        least = torch.tensor(self.minimum)
        return self.allocate.counts(Demand(share, stack([*caps.values()], 0), even, least, sure, weights=weights))

    def _sure(self, turn: Turn, sight: Tensor) -> Tensor:
        """[layers, G]: of the tokens in sight, the first and last, which stay in any case; sinks slide out of it."""
        slid = turn.length - sight
        return torch.minimum((self.first - slid).clamp(min=0) + self.window, sight)

    @staticmethod
    def _in_sight(turn: Turn, layers: list[int]) -> Tensor:
        """[layers, G]: the tokens of this row that a query behind them can see in these layers.

        What earlier turns have dropped counts too: a head that was left few entries may not have its share, but the
        others have it then.
        """
        cache, real = turn.cache, turn.cache.real(turn.row)
        total = cache.get_seq_length(cache.attending()[0])
        return stack([torch.full((layer.groups,), layer.in_sight(real, total))
                      for layer in (cache.layers[index] for index in layers)], 0)

    def _keep(self, layer: Scored, counts: Tensor, length: int) -> Tensor:
        """bool [G, T]: sinks and window first, then the best."""
        counts = counts.to(layer.scores.device)
        sure = layer.scores.masked_fill(self._protected(layer, counts, length), torch.inf)
        return ranks(sure) < counts.unsqueeze(-1)

    def ends(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Of the `counts` entries that a head keeps, how many are its first and how many its last, whatever is set."""
        part = (counts * self.protect).long()
        return part, part

    def _protected(self, layer: Scored, counts: Tensor, length: int) -> Tensor:
        """bool [G, T]: first and last tokens. In a head of few entries sinks take half, the window the rest.

        First tokens that are not there, having slid out of the layer's window, take nothing.
        """
        counts, there = counts.to(layer.positions.device), layer.positions >= 0
        first, last = self.ends(counts)
        sinks, window = first.clamp(min=self.first), last.clamp(min=self.window)
        held = (there & (layer.positions < sinks.unsqueeze(-1))).sum(-1)
        some = torch.where(counts < held + window, torch.minimum(held, (counts + 1) // 2), held)
        window = torch.minimum(window, counts - some)
        first = layer.positions < (sinks - held + some).unsqueeze(-1)
        last = layer.positions >= length - window.unsqueeze(-1)
        return (first | last) & there


def view_of(turn: Turn, index: int, entries: Entries) -> LayerKV:
    """The scorer's view of one layer of one row."""
    layer, row, real = turn.cache.layers[index], turn.row, turn.cache.real(turn.row)
    ids = turn.cache.position_ids
    table = None if ids is None else ids[row]
    queries = query_positions = asked = hidden = None
    if layer.queries is not None:
        columns = layer.query_positions[row]
        there = _are_real(columns, real)
        queries, columns = layer.queries[row, :, there].unsqueeze(0), layer.query_positions[row, there]
        hidden = None if layer.hidden is None else layer.hidden[row, there].unsqueeze(0)
        query_positions, asked = index_of_real(real, columns).unsqueeze(0), look_up(table, columns).unsqueeze(0)
    furthest = layer.seen if ids is None else max(layer.seen, int(ids.max()) + 1)
    source = Source(turn.live.model, turn.record, look_up(table, entries.positions).unsqueeze(0), asked, furthest,
                    turn.live.now.shared, turn.live.now.rehearsing)
    columns = {name: column.unsqueeze(0) for name, column in entries.carried.items()}
    return LayerKV(entries.keys.unsqueeze(0), entries.values.unsqueeze(0), queries, query_positions,
                   index_of_real(real, entries.positions).unsqueeze(0), torch.tensor([turn.length]), index,
                   turn.live.rules[index], source, columns, hidden=hidden)


def _are_real(columns: Tensor, real: Tensor | None) -> Tensor:
    """bool like columns: neither NONE nor a token that the mask hides now."""
    there = columns >= 0
    return there if real is None else there & real[columns.clamp(min=0).long()]
