"""KVzip: keep what the model looks at when it reads the context a second time.

    s_j = max over all queries t of the second reading, and over the heads h of the group, of a_tj^h
    plus: of a_tj^h * |v_j W_O^h| / |x_t|            x_t: what the layer's attention reads at t

Kim et al., 2025 (arXiv:2505.23416); `plus` is KVzip+ (Jegou and Jeblick, 2026, arXiv:2601.07891). The context is asked
for again and read in chunks behind itself; it takes two to three prefills more. Differs from the paper: attention is
that over the whole context, as the model computes it, where the paper's is over first entries and one chunk; one
request for all chunks; the last tokens stay, which a second reading hardly looks at and what comes next does.
"""
from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.data import check_ids
from llmopt.kv.allocators import Allocator, Global
from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.method import Record, Run
from llmopt.parts import register
from llmopt.runtime.replay import chunks, request, sizes


@register("kv.kvzip")
@dataclass(frozen=True)
class KVzip(Scorer):
    """What a second reading of the context looks at, whatever is asked later; two to three prefills more."""

    replays: ClassVar = True

    sinks: int = Field(4, ge=0, description="first tokens, always kept")
    window: int = Field(4, ge=0, description="last tokens, always kept; reading again hardly looks at them")
    chunk: int = Field(512, ge=16, description="tokens that are read again at a time")
    plus: bool = Field(False, description="weigh attention by what the value does to the residual stream (KVzip+)")
    allocate: Allocator = Field(Global(), description="how many entries each KV head keeps")

    @property
    def hidden(self) -> bool:
        return self.plus

    def condense(self, hidden: Tensor, index: int, record: Record) -> Tensor:
        return sizes(hidden)

    def queries(self) -> None:
        return None

    def learn(self, model: nn.Module, run: Run) -> Record:
        return Record({"request": request(run.tokenizer)})

    @property
    def meta_shape(self) -> dict:
        return {"request": [int], **super().meta_shape}

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        check_ids([(min(ids), max(ids)) for ids in [record.meta["request"]] if ids], model.config.vocab_size)

    def replay(self, ids: Tensor, record: Record) -> Iterator[Tensor]:
        yield from chunks(ids, record.meta.get("request", []), self.chunk)

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return kv.max_over_group(kv.column_max(kv.hidden) * kv.effects() if self.plus else kv.column_max())
