"""Quantized cache: entries become codes of a few bits, all but the newest; it stands beside any method that drops some.

    rotate:  x' = x R, R a randomized Hadamard transform; what a query makes of k' and v', turned back, is unchanged
    uniform: x' ~ low + scale * code, low and scale of each `group_size` neighbours along D
    lloyd:   x' ~ scale * level[code], scale = root mean square, levels of least error for the normal distribution
    keys: channel: no rotation; low and scale of each channel over runs of `group_size` entries
    keys: token: what is coded of a key is what it has beside the mean of its run (centres.py)

After QuaRot (arXiv:2404.00456), TurboQuant (arXiv:2504.19874) and, for channels, KIVI (arXiv:2402.02750). Scales and
lows are fp16. Codes are kept as they are when entries are dropped or added. A decoding step multiplies them as they
are: the query is rotated once, scales, lows and means meet the products, the output is turned back once; longer turns
and `keys: channel` make them dense again. Left out: TurboQuant's extra bit for unbiased products and its norm of a
whole vector (each group has its own); means of values, which would make that of attention's sink, a small one, larger;
steps of least squared error in place of the whole range (two of 33 answers fewer); a compiled kernel.
"""
from dataclasses import replace
from typing import Literal

import torch
from llmopt_kernels import NONE, Packed
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import FieldError
from llmopt.kv.centres import runs_of
from llmopt.kv.codes import Codes, Form
from llmopt.kv.mixed import Mixed
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.parts import register
from llmopt.runtime.attach import StoreMethod
from llmopt.runtime.cache_layer import SOURCE, Entries
from llmopt.runtime.compression import Packing

GROUP = 64
Bits = Literal[2, 3, 4, 8]


@register("kv.quant")
@dataclass(frozen=True)
class Quant(StoreMethod):
    """Entries in codes of a few bits, all but the newest."""

    bits: Bits = Field(4, description="of each number")
    key_bits: Bits | None = Field(None, description="of keys, if other than bits")
    value_bits: Bits | None = Field(None, description="of values, if other than bits")
    rotate: bool = Field(True, description="spread large coordinates by a random rotation before rounding")
    group_size: int | None = Field(None, ge=1, description="neighbours that share a scale; null: 64, or the whole head "
                                                           "where 64 does not divide it")
    keys: Literal["token", "channel"] = Field("token", description="which keys share a scale; channel: no rotation")
    codebook: Literal["uniform", "lloyd"] = Field("uniform", description="equal steps, or levels for normal numbers")
    residual: int = Field(64, ge=0, description="newest entries of each head, left as they are")
    every: int | None = Field(64, ge=1, description="pack again after so many tokens of decoding")

    def check(self) -> None:
        if self.codebook == "lloyd" and not (self.rotate and self.keys == "token"):
            raise FieldError("codebook", self.codebook, "uniform without a rotation (rotate: false, keys: channel)")

    def plan(self, model: nn.Module, run: Run) -> Record:
        self._check_heads(model)
        return Record()

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        self._check_heads(model)

    def _check_heads(self, model: nn.Module) -> None:
        """Raise FieldError unless groups go evenly into the heads."""
        for dim in {block.head_dim for block in blocks(model) if block.attention is not None}:
            if dim % self._group(dim):
                fits = [n for n in range(1, dim + 1) if dim % n == 0]
                best = min(fits, key=lambda n: abs(n - self.group_size))
                raise FieldError("group_size", self.group_size, f"a divisor of the head's {dim} numbers",
                                 f"; nearest: {best}")

    def _group(self, dim: int) -> int:
        return self.group_size or (GROUP if dim % GROUP == 0 else dim)

    @torch.no_grad()
    def pack(self, entries: Entries, packing: Packing) -> Entries:
        there = entries.positions != NONE                                                              # [G, T]
        old = there & (there.flip(-1).cumsum(-1).flip(-1) > self.residual)
        source = (entries.column(SOURCE, torch.long) - 1).masked_fill(~there, -1)
        before = packing.before
        group, channel = self._group(entries.keys.shape[-1]), self.keys == "channel"
        lloyd = self.codebook == "lloyd"
        keys = Form(self.key_bits or self.bits, group, self.rotate and not channel, lloyd, channel, not channel)
        values = Form(self.value_bits or self.bits, self._group(entries.values.shape[-1]), self.rotate, lloyd)
        return replace(entries, keys=packed(entries.keys, old, source, before and before.keys, keys),
                       values=packed(entries.values, old, source, before and before.values, values))


def packed(x: Tensor, old: Tensor, source: Tensor, before: Tensor | Packed | None, form: Form) -> Mixed:
    """Entries x [G, T, D] in codes where they were so in `before`, those in `old` [G, T] in new ones.

    source: int64 [G, T], the place of each in `before`, -1 where it has none. Per channel, a head's entries that do
    not fill a run yet stay dense.
    """
    known = torch.zeros_like(old)
    if isinstance(before, Mixed) and before.codes.form == form:
        known = source >= 0
        known[known.clone()] = before.old[source[known]]
    fresh = old & ~known
    if form.channel:
        fresh &= fresh.cumsum(1) <= fresh.sum(1, keepdim=True) // form.group * form.group
    again = before.codes[before.places[source[known]]] if bool(known.any()) else None
    runs = runs_of(x, known, fresh, again) if form.centre else None
    new = x[fresh].float()
    codes = Codes.of(new if runs is None else new - runs.centres[runs.of[fresh]].float(), form)
    if again is not None:
        places = torch.cat([mask.flatten().nonzero().flatten() for mask in (known, fresh)])
        codes = Codes.cat([again.bare(), codes])[places.argsort()]
    if runs is not None:
        codes = codes.around(runs.of[known | fresh], runs.centres)
    return Mixed.of(known | fresh, codes, x[~(known | fresh)])
