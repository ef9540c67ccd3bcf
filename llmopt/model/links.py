"""What feeds what inside a model, and the edits along such a link that change no output.

    scale:  producer * s, readers' columns / s           fold:  y = g n + b,  W y + c = (W g) n + (W b + c)
    turn:   producer Q, readers' columns Q               Q orthogonal: (y Q) (W Q)^T = y W^T

n is the normalised stream, g and b a norm's gain and bias. A head without a bias c keeps b: y = g (n + b / g). A stream
that became x Q is turned while a norm is folded: normalise(x Q) = n Q, but only without a gain.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model.weights import Projection, Turn

LEAST = 1e-4        # of the largest gain: a smaller one is not divided by


@dataclass(frozen=True)
class Norm:
    """A normalisation of the residual stream: y = normalise(x) * (offset + weight) [+ bias]."""

    role: str                        # attn_in | attn_out | ffn_in | ffn_out | both_in (of parallel parts) | final
    name: str
    module: nn.Module
    kind: Literal["rms", "layer"]
    offset: float = 0.0

    @property
    def weight(self) -> nn.Parameter | None:       # [E]
        """What a gain is stored in; None for a norm without one, as OPT allows and OLMo has it."""
        return self.module._parameters.get("weight")

    @property
    def gain(self) -> Tensor | float:              # [E] float32
        """The factor of the normalised stream; 1 for a norm without a weight."""
        return 1.0 if self.weight is None else self.offset + self.weight.data.float()

    @property
    def bias(self) -> Tensor | None:               # [E]
        """The term added after normalising; None for RMS norms."""
        bias = self.module._parameters.get("bias")
        return None if bias is None else bias.data

    def set_gain_(self, gain: Tensor) -> None:
        """Multiply the normalised stream by `gain` [E] from now on."""
        if self.weight is None:
            raise LlmoptError(f"{self.name}: has no gain that could be changed")
        self.weight.data.copy_(gain - self.offset)

    def scale_(self, factor: Tensor) -> None:
        """Multiply what the norm puts out by `factor` [E]."""
        self.set_gain_(self.gain * factor)
        if self.bias is not None:
            self.bias.mul_(factor)


@dataclass(frozen=True)
class Rows:
    """The channels that some output rows of a projection compute: rows [C]."""

    projection: Projection
    rows: Tensor

    def scale_(self, factor: Tensor) -> None:
        """Multiply these channels by `factor` [C]."""
        weight, bias = self.projection.weight, self.projection.bias
        weight[self.rows] = (weight[self.rows].float() * factor[:, None]).to(weight.dtype)
        if bias is not None:
            bias[self.rows] = (bias[self.rows].float() * factor).to(bias.dtype)

    def turn_(self, turn: Turn) -> None:
        """Turn these channels: rows <- Q^T rows."""
        weight, bias = self.projection.weight, self.projection.bias
        weight[self.rows] = turn(weight[self.rows].T).T.to(weight.dtype)
        if bias is not None:
            bias[self.rows] = turn(bias[self.rows]).to(bias.dtype)


@dataclass(frozen=True)
class Link:
    """A producer of channels and all the projections that read them, and nothing else.

    columns: the channel [in] that each input column of the readers reads (the value heads of a KV group are read by
    several query heads); None: column i reads channel i.
    """

    producer: Norm | Rows
    readers: Sequence[Projection]
    columns: Tensor | None = None

    @property
    def scalable(self) -> bool:
        """False behind a norm without a gain."""
        return isinstance(self.producer, Rows) or self.producer.weight is not None

    def by_channel(self, values: Tensor) -> Tensor:                 # [in] -> [C]
        """Numbers of the readers' input columns, of those that read one channel their mean."""
        if self.columns is None:
            return values
        columns = self.columns.to(values.device)
        return values.new_zeros(int(columns.max()) + 1).index_add_(0, columns, values) / columns.bincount()

    def scale_(self, factor: Tensor) -> None:
        """Multiply the producer's channels by `factor` [C], and divide it out of what reads them."""
        self.producer.scale_(factor)
        for reader in self.readers:
            reader.scale_columns_(1 / (factor if self.columns is None else factor[self.columns]))

    def turn_(self, turn: Turn) -> None:
        """Turn the channels that rows produce, and the columns that read them; both in parts as wide as Q."""
        self.producer.turn_(turn)
        for reader in self.readers:
            reader.turn_columns_(turn)

    def fold_(self, turn: Turn | None = None) -> None:
        """Move a norm's gain, and its bias where all readers have one, into the readers: it then only normalises.

        turn: the stream in front of the norm has become x Q; the readers read n Q, a bias that stays is turned too.
        """
        norm, gain = self.producer, self._given_up()
        if turn is None:
            for reader in self.readers if isinstance(gain, Tensor) else ():
                reader.scale_columns_(gain)
            return
        if norm.weight is not None and not norm.weight.is_meta and bool((norm.gain != 1).any()):
            raise LlmoptError(f"{norm.name}: has a bias on channels with almost no gain, so that it cannot be rotated")
        for reader in self.readers:
            reader.turn_columns_(turn, gain)
        if norm.bias is not None:
            norm.bias.copy_(turn(norm.bias))

    def _given_up(self) -> Tensor | float:
        """The gain [E] that the norm has just lost to its readers; 1 for a norm without one."""
        norm = self.producer
        if norm.weight is None:
            return 1.0
        gain, left = norm.gain, torch.ones_like(norm.weight, dtype=torch.float32)
        if norm.bias is not None and all(reader.bias is not None for reader in self.readers):
            for reader in self.readers:
                reader.bias.add_(reader.weight.float() @ norm.bias.float())
            norm.bias.zero_()
        elif norm.bias is not None:
            divisible = gain.abs() > LEAST * gain.abs().max()
            gain, left = torch.where(divisible, gain, 1.0), torch.where(divisible, left, gain)
            norm.bias.div_(gain)
        norm.set_gain_(left)
        return gain
