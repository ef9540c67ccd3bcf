"""Keys or values as codes of a few bits; the newest entries stay as they are."""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from llmopt_kernels import Packed
from torch import Tensor
from torch.nn.functional import pad

from llmopt.kv.codebook import midpoints, normal_levels, rotation

FP16 = torch.finfo(torch.float16)
BLOCK = 8192        # entries that are unpacked at a time


@dataclass(frozen=True)
class Form:
    """How numbers become codes of `bits`: `group` neighbours along D share a scale; `channel`: one channel of a run of
    `group` entries. lloyd: levels of the normal distribution in place of equal steps.
    """

    bits: int
    group: int
    rotate: bool = True
    lloyd: bool = False
    channel: bool = False


def squeeze(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, D] in bytes [N, W], W = ceil(D bits / 8): byte i holds the codes i, W + i, 2 W + i, ...

    Of 3 bits the lower two of all come first, then the upper ones.
    """
    if bits == 3:
        return torch.cat([squeeze(codes & 3, 2), squeeze(codes >> 2, 1)], 1)
    many = 8 // bits
    lots = pad(codes, (0, -codes.shape[1] % many)).unflatten(1, (many, -1))                  # [N, codes a byte, W]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (lots << shifts.unsqueeze(1)).sum(1, dtype=torch.uint8)


def spread(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes [N, D] that `squeeze` put into these bytes."""
    if bits == 3:
        low = -(-dim // 4)
        return spread(words[:, :low], 2, dim) | spread(words[:, low:], 1, dim) << 2
    return torch.cat(planes(words, bits), 1)[:, :dim]


def planes(words: Tensor, bits: int) -> list[Tensor]:
    """The codes that lie in the first bits of all bytes, in the next bits, ...: uint8 [N, W] each."""
    shifted = [words, *(words >> shift for shift in range(bits, 8, bits))]
    return [*(plane & 2 ** bits - 1 for plane in shifted[:-1]), shifted[-1]]             # nothing is above the last


@dataclass(frozen=True)
class Codes:
    """Entries [N, D] in codes. Each stands for low + code * scale, or for its level * scale, turned back."""

    words: Tensor                # [N, W] uint8
    scales: Tensor               # [N, D / group], of channels [R, D]; fp16
    lows: Tensor | None          # as the scales, fp16; None: levels of the normal distribution
    runs: Tensor | None          # of channels: how many entries of each run are left, in order, int32 [R]
    form: Form
    dim: int

    @classmethod
    def of(cls, x: Tensor, form: Form) -> "Codes":
        """x: [N, D]; of channels, N is a multiple of the run."""
        x = x.float() @ rotation(x.shape[1]).to(x.device) if form.rotate else x.float()
        parts, along = (x.unflatten(0, (-1, form.group)), 1) if form.channel else (x.unflatten(1, (-1, form.group)), 2)
        if form.lloyd:
            lows, scales = None, _half(parts.square().mean(along, keepdim=True).sqrt())
            edges = midpoints(normal_levels(form.bits)).to(x.device)
            codes = torch.bucketize(parts / _divisor(scales), edges)
        else:
            lows, highs = (_half(end) for end in parts.aminmax(dim=along, keepdim=True))
            scales = _half((highs.float() - lows.float()) / (2 ** form.bits - 1))
            codes = ((parts - lows.float()) / _divisor(scales)).round().clamp(0, 2 ** form.bits - 1)
            lows = lows.squeeze(along)
        runs = torch.full((len(parts),), form.group, dtype=torch.int32, device=x.device) if form.channel else None
        return cls(squeeze(codes.to(torch.uint8).view(x.shape), form.bits), scales.squeeze(along), lows, runs, form,
                   x.shape[1])

    def __getitem__(self, index: Tensor | slice) -> "Codes":
        """The entries that a slice or int64 indices select."""
        if self.runs is None:
            lows = None if self.lows is None else self.lows[index]
            return replace(self, words=self.words[index], scales=self.scales[index], lows=lows)
        run, runs = torch.unique_consecutive(self._run[index], return_counts=True)
        return replace(self, words=self.words[index], scales=self.scales[run], lows=self.lows[run], runs=runs.int())

    def __len__(self) -> int:
        return len(self.words)

    @property
    def _run(self) -> Tensor:
        """[N]: the run of every entry."""
        return torch.arange(len(self.runs), device=self.runs.device).repeat_interleave(self.runs)

    def dense(self) -> Tensor:
        """[N, D], fp32."""
        return self._turned_back(self._numbers())

    def _numbers(self) -> Tensor:
        """[N, D], fp32, as they were rounded: after the rotation."""
        codes = spread(self.words, self.form.bits, self.dim)
        if self.lows is None:
            return self._levels(codes) * self._wide(self.scales)
        return torch.addcmul(self._wide(self.lows), codes.float(), self._wide(self.scales))

    def _levels(self, codes: Tensor) -> Tensor:
        levels = normal_levels(self.form.bits).to(codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)

    def _turned_back(self, x: Tensor) -> Tensor:
        return x @ rotation(self.dim).T.to(x.device) if self.form.rotate else x

    def products(self, rows: Tensor) -> Tensor:
        """rows [R, D], fp32, times each entry: [R, N]. The rows are rotated, the entries are not turned back.

            q (low + scale code) = scale (q code) + low sum(q), group by group
        """
        rows = rows @ rotation(self.dim).to(rows.device) if self.form.rotate else rows
        if self.form.channel:
            return rows @ self._numbers().T
        found = rows.new_empty(len(rows), len(self.words))
        for block in self._blocks():
            scales = self.scales[block].T.float().unsqueeze(1)                           # [groups, 1, n]
            sums = scales.new_zeros(len(scales), len(rows), scales.shape[2])
            for units, dims, weight in self._units(block):
                sums[dims.start // self.form.group].addmm_(rows[:, dims], units.T, alpha=weight)
            found[:, block] = (sums * scales).sum(0)
        if self.lows is not None:
            found.addmm_(rows.unflatten(1, (-1, self.form.group)).sum(2), self.lows.T.float())
        return found

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum of the entries with each row of weights [R, N], fp32: [R, D]."""
        if self.form.channel:
            return self._turned_back(weights @ self._numbers())
        found = weights.new_zeros(len(weights), self.dim)
        for block in self._blocks():
            scaled = weights[:, block] * self.scales[block].T.float().unsqueeze(1)       # [groups, R, n]
            for units, dims, weight in self._units(block):
                found[:, dims].addmm_(scaled[dims.start // self.form.group], units, alpha=weight)
        if self.lows is not None:
            found += (weights @ self.lows.float()).repeat_interleave(self.form.group, 1)
        return self._turned_back(found)

    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, len(self.words), BLOCK)]

    def _units(self, block: slice) -> Iterator[tuple[Tensor, slice, int]]:
        """Codes or levels of a block of entries, in pieces: (fp32 [n, d], the d dimensions of one group, a factor).

        Bytes need not be put together for it: the number of a code is the sum of what its pieces say.
        """
        for plane, start, weight in self._planes(self.words[block]):
            end = min(start + plane.shape[1], self.dim)
            cuts = [start, *range((start // self.form.group + 1) * self.form.group, end, self.form.group), end]
            for low, high in pairwise(cuts):
                yield plane[:, low - start:high - start], slice(low, high), weight

    def _planes(self, words: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Neighbouring dimensions of entries: (fp32 [n, d], the first of them, a factor)."""
        if self.lows is None:
            yield self._levels(spread(words, self.form.bits, self.dim)), 0, 1
            return
        parts = [(words, self.form.bits, 1)]
        if self.form.bits == 3:
            low, high = words.tensor_split([-(-self.dim // 4)], 1)
            parts = [(low.contiguous(), 2, 1), (high.contiguous(), 1, 4)]
        for part, bits, weight in parts:
            for index, plane in enumerate(planes(part, bits)):
                if index * plane.shape[1] < self.dim:
                    yield plane.float(), index * plane.shape[1], weight

    def _wide(self, table: Tensor) -> Tensor:
        """Scales or lows for each number: [N, D], fp32."""
        return table.float()[self._run] if self.form.channel else table.float().repeat_interleave(self.form.group, 1)

    @classmethod
    def cat(cls, parts: list["Codes"]) -> "Codes":
        """Parts of one form, one behind the other."""
        def joined(name: str) -> Tensor | None:
            pieces = [getattr(part, name) for part in parts]
            return None if pieces[0] is None else torch.cat(pieces)

        return replace(parts[0], **{name: joined(name) for name in ("words", "scales", "lows", "runs")})

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.words, self.scales, self.lows, self.runs) if t is not None]


def _half(x: Tensor) -> Tensor:
    return x.clamp(FP16.min, FP16.max).half()


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by: where all numbers of a group are alike, anything."""
    return torch.where(scales == 0, 1.0, scales.float())


@dataclass(frozen=True)
class Mixed(Packed):
    """Entries of which some are in codes and the others dense, in the order in which they lie.

    stretches: int64 on the CPU, how many entries in a row are in codes, are dense, are in codes, ...
    """

    stretches: Tensor
    codes: Codes                 # of M entries
    new: Tensor                  # [N - M, D]
    shape: tuple[int, ...]       # leading axes; their product is N

    @classmethod
    def of(cls, old: Tensor, codes: Codes, new: Tensor) -> "Mixed":
        """old: bool, of the shape of the leading axes: where the entries in codes lie."""
        kinds, stretches = torch.unique_consecutive(old.flatten(), return_counts=True)
        first = stretches.new_zeros(int(len(kinds) > 0 and not bool(kinds[0])))
        return cls(torch.cat([first, stretches]).cpu(), codes, new, tuple(old.shape))

    @property
    def old(self) -> Tensor:
        """bool [N]: the entries that are in codes."""
        kinds = torch.arange(len(self.stretches)) % 2 == 0
        return kinds.repeat_interleave(self.stretches).to(self.new.device)

    @property
    def places(self) -> Tensor:
        """int64 [N]: the place of every entry in `codes` or in `new`."""
        old = self.old
        return torch.where(old, old.cumsum(0), (~old).cumsum(0)) - 1

    def __getitem__(self, index) -> "Mixed":
        if isinstance(index, slice) and len(self.shape) == 1:
            return self._slice(*index.indices(self.shape[0])[:2])
        chosen = torch.arange(len(self.old), device=self.new.device).view(self.shape)[index]
        old, places = self.old[chosen], self.places[chosen]
        return Mixed.of(old, self.codes[places[old]], self.new[places[~old]])

    def _slice(self, start: int, stop: int) -> "Mixed":
        """Neighbours, without looking at the others."""
        end, before, within = 0, 0, []
        for index, count in enumerate(self.stretches.tolist()):
            first, end = end, end + count
            within.append(max(0, min(end, stop) - max(first, start)))
            before += max(0, min(end, start) - first) if index % 2 == 0 else 0
        many = sum(within[::2])
        there = [pair for pair in zip(within[::2], [*within[1::2], 0], strict=False) if any(pair)]
        return Mixed(torch.tensor(there, dtype=torch.long).flatten(), self.codes[before:before + many],
                     self.new[start - before:stop - before - many], (stop - start,))

    def products(self, rows: Tensor) -> Tensor:
        found = torch.cat([self.codes.products(rows), rows @ self.new.float().T], 1)
        if self._apart:
            return found
        old = self.old
        return found[:, torch.where(old, self.places, len(self.codes) + self.places)]

    def weighted(self, weights: Tensor) -> Tensor:
        many = len(self.codes)
        old, new = (slice(many), slice(many, None)) if self._apart else (self.old, ~self.old)
        return self.codes.weighted(weights[:, old]) + weights[:, new] @ self.new.float()

    @property
    def _apart(self) -> bool:
        """True if all entries in codes come first."""
        return not any(self.stretches[2::2].tolist())

    def dense(self) -> Tensor:
        old = self.old
        x = self.new.new_empty(len(old), self.new.shape[-1])
        x[old], x[~old] = self.codes.dense().to(x.dtype), self.new
        return x.view(*self.shape, x.shape[-1])

    @classmethod
    def cat(cls, parts: list["Mixed"]) -> "Mixed":
        return cls.of(torch.cat([part.old for part in parts]), Codes.cat([part.codes for part in parts]),
                      torch.cat([part.new for part in parts]))

    def tensors(self) -> list[Tensor]:
        return [self.stretches, *self.codes.tensors(), self.new]
