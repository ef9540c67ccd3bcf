"""Keys or values as codes of a few bits."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt.kv.codebook import midpoints, normal_levels, rotation

FP16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Form:
    """How numbers become codes of `bits`: `group` neighbours along D share a scale; `channel`: one channel of a run of
    `group` entries. lloyd: levels of the normal distribution in place of equal steps. centre: entries are coded around
    the mean of their run (centres.py).
    """

    bits: int
    group: int
    rotate: bool = True
    lloyd: bool = False
    channel: bool = False
    centre: bool = False


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
    planes = [words >> shift & 2 ** bits - 1 for shift in range(0, 8, bits)]
    return torch.cat(planes, 1)[:, :dim]


@dataclass(frozen=True)
class Codes:
    """Entries [N, D] in codes. Each stands for low + code * scale, or for its level * scale, turned back, and the
    centre of its run if there is one.

    A run is of neighbours that share a centre, or scales of channels.
    """

    words: Tensor                # [N, W] uint8
    scales: Tensor               # [N, D / group], of channels [R, D]; fp16
    lows: Tensor | None          # as the scales, fp16; None: levels of the normal distribution
    runs: Tensor | None          # how many entries of each run are left, in order, int32 [R]
    form: Form
    dim: int
    centres: Tensor | None = None            # [R, D] bf16, not turned

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
        run, runs = (None, None) if self.runs is None else self._left(index)
        by = run if self.form.channel else index
        return replace(self, words=self.words[index], scales=self.scales[by], runs=runs,
                       lows=None if self.lows is None else self.lows[by],
                       centres=None if self.centres is None else self.centres[run])

    def _left(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Which runs a selection has, and how many of each. Entries that come again begin runs of their own."""
        if isinstance(index, slice):
            ends, (start, stop, _) = self.runs.cumsum(0), index.indices(len(self))
            left = ends.clamp(start, stop) - (ends - self.runs).clamp(start, stop)
            return left.nonzero().flatten(), left[left > 0].int()
        run = self.run[index]
        begins = torch.ones_like(run, dtype=torch.bool)
        begins[1:] = (run[1:] != run[:-1]) | (index[1:] <= index[:-1])
        starts = begins.nonzero().flatten()
        return run[starts], torch.cat([starts, starts.new_tensor([len(run)])]).diff().int()

    def __len__(self) -> int:
        return len(self.words)

    @property
    def run(self) -> Tensor:
        """int64 [N]: the run of every entry."""
        return torch.arange(len(self.runs), device=self.runs.device).repeat_interleave(self.runs)

    def dense(self) -> Tensor:
        """[N, D], fp32."""
        x = self.turned_back(self.numbers())
        return x if self.centres is None else x + self.centres.float()[self.run]

    def bare(self) -> "Codes":
        """Codes without their centres, to be put around them again."""
        return self if self.centres is None else replace(self, runs=None, centres=None)

    def around(self, run: Tensor, centres: Tensor) -> "Codes":
        """Codes of what was left when the centre of its `run` [N] had been taken from each entry."""
        run, runs = run.unique_consecutive(return_counts=True)
        return replace(self, runs=runs.int(), centres=centres[run])

    def numbers(self) -> Tensor:
        """[N, D], fp32, as they were rounded: after the rotation, without centres."""
        if self.lows is None:
            return self.levels(self.words) * self._wide(self.scales)
        codes = spread(self.words, self.form.bits, self.dim)
        return torch.addcmul(self._wide(self.lows), codes.float(), self._wide(self.scales))

    def levels(self, words: Tensor) -> Tensor:
        """The levels [..., D] for which bytes [..., W] stand, fp32."""
        codes = spread(words.flatten(0, -2), self.form.bits, self.dim)
        levels = normal_levels(self.form.bits).to(codes.device)
        return levels.index_select(0, codes.flatten().int()).view(*words.shape[:-1], self.dim)

    def turned_back(self, x: Tensor) -> Tensor:
        """Numbers [..., D] after the rotation, as they were before it."""
        return x @ rotation(self.dim).T.to(x.device) if self.form.rotate else x

    def _wide(self, table: Tensor) -> Tensor:
        """Scales or lows for each number: [N, D], fp32."""
        return table.float()[self.run] if self.form.channel else table.float().repeat_interleave(self.form.group, 1)

    @classmethod
    def cat(cls, parts: list["Codes"]) -> "Codes":
        """Parts of one form, one behind the other."""
        def joined(name: str) -> Tensor | None:
            pieces = [getattr(part, name) for part in parts]
            return None if pieces[0] is None else torch.cat(pieces)

        return replace(parts[0], **{name: joined(name) for name in ("words", "scales", "lows", "runs", "centres")})

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.words, self.scales, self.lows, self.runs, self.centres) if t is not None]


def _half(x: Tensor) -> Tensor:
    return x.clamp(FP16.min, FP16.max).half()


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by: where all numbers of a group are alike, anything."""
    return torch.where(scales == 0, 1.0, scales.float())
