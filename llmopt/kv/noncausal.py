"""Non-causal attention: keep what all queries of the neighbourhood look at, those before it too.

    s_j = avgpool_3( mean_{h in group} sum_{t in chunk of j} softmax_{i in chunk}(q_t k_i)_j * |v_j| )

One half of Compactor (Chari and Van Durme, 2025, arXiv:2507.08143). Logits are not scaled, as in the authors' press in
kvpress: each query speaks for the few keys that it is most like. Compactor takes the layer's own scale. An entry keeps
in later turns what its own chunk gave it. Differs: the last tokens stay, which what comes next reads most (in the press
the padding behind a last chunk that is not full votes for that chunk's tokens, which favours them, too). Left out: the
score's mean and spread are not taken out of it, which changes no choice inside a layer.
"""
from dataclasses import replace

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, where
from torch.nn.functional import avg_pool1d

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register

POOL = 3
CHUNK = 256


@register("kv.noncausal")
@dataclass(frozen=True)
class NonCausal(Scorer):
    """Attention inside chunks, without regard to order: no query is asked about the far past."""

    window: int = Field(4, ge=0, description="last tokens, always kept")
    chunk: int = Field(CHUNK, ge=2, description="tokens that look at each other")

    def queries(self) -> None:
        return None

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return non_causal(replace(kv, rule=replace(kv.rule, scaling=1.0)), self.chunk)

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        return {"noncausal": scores}


def non_causal(kv: LayerKV, size: int) -> Tensor:
    """The scores above, by the scale of `kv.rule`; entries of earlier turns have what they carry: [B, G, T]."""
    votes = kv.mean_over_group(chunk_sums(kv, size)) * kv.values.float().norm(dim=-1)
    votes = avg_pool1d(votes.masked_fill(kv.holes, 0.0), POOL, stride=1, padding=POOL // 2)
    return where(kv.positions < kv.query_positions.amin(-1)[:, None, None], kv.carried["noncausal"], votes)


def chunk_sums(kv: LayerKV, size: int) -> Tensor:
    """Attention that each entry receives from the queries of its own chunk, which see the chunk alone: [B, H, T]."""
    total = kv.keys.new_zeros(*kv.queries.shape[:2], kv.keys.shape[2]).float()
    for start in range(0, kv.queries.shape[2], size):
        part = slice(start, start + size)
        first, last = kv.query_positions[:, part].aminmax(dim=-1)
        inside = (kv.positions >= first[:, None, None]) & (kv.positions <= last[:, None, None])
        places = inside.flatten(0, 1).any(0).nonzero()
        if len(places) > 0:                                                  # else it slid out of the layer's window
            span = slice(int(places[0]), int(places[-1]) + 1)
            seen = inside[..., span]
            total[..., span] += kv.weights_of(part, span, None if bool(seen.all()) else seen.unsqueeze(2)).sum(-2)
    return total
