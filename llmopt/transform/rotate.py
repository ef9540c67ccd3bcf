"""Rotation: the residual stream and the value heads in other axes, in which no channel stands out.

    x' = x Q:   embeddings E Q,  readers (W g) Q,  writers Q^T W, b Q        normalise(x Q) = normalise(x) Q
    v' = v R:   rows of v  R^T W_v, b_v R,  columns of the attention's writer  W_o R,  in each head

Q and R are randomized Hadamard matrices (rotation.py), g the gains of the norms, folded into their readers first. An
outlier is spread over all channels, so that neither a group's scale nor the grid of activations must reach to it. The
final norm goes into the output head, which gets a weight of its own where it was tied: the file grows by it. Streams of
LayerNorms are rotated around their mean; the embeddings of others keep theirs (QuaRot's code takes it off, which RMS
norms notice). All products in float64. QuaRot, arXiv:2404.00456. channels: a small rotation for each group of channels
that share a scale, as float formats like it (MR-GPTQ, arXiv:2509.23202).

Left out: rotations that are computed while the model runs (the FFN writer's input, keys, and those of activations).
"""
import logging

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.calibration.walk import Visit
from llmopt.errors import FieldError
from llmopt.method import Record, Run
from llmopt.model.blocks import Block, refuse_turning
from llmopt.model.links import Norm
from llmopt.model.outside import Outside
from llmopt.parts import register
from llmopt.transform.base import Figures, Transform
from llmopt.transform.rotation import Rotation

LOG = logging.getLogger(__name__)


@register("transform.rotate")
@dataclass(frozen=True)
class Rotate(Transform):
    """No data needed."""

    stream: bool = Field(True, description="rotate the residual stream, which folds the norms and unties a tied head")
    heads: bool = Field(True, description="rotate what each head of v puts out")
    channels: int | None = Field(None, ge=2, description="of the stream, so many are mixed with one another: such as a "
                                                         "group of a float format; null: all")
    seed: int = Field(0, description="draws the signs")

    def check(self) -> None:
        if not self.stream and not self.heads:
            raise FieldError("heads", self.heads, "true, where the stream is not rotated")

    def refuse(self, model: nn.Module) -> None:
        if not self.stream:
            return
        refuse_turning(model)
        rest = Outside(model)
        width = rest.embeddings.embedding_dim
        if self.channels and width % self.channels:
            raise FieldError("channels", self.channels, f"a divisor of the {width} channels of the residual stream")
        rest.links()                                    # raises where the head does not read the stream itself

    def block(self, block: Block, visit: Visit | None, run: Run) -> Figures:
        before = _zeros(block)
        done = {"folded": self._turn_stream(block) if self.stream else [],
                "heads": self._turn_heads(block) if self.heads else 0}
        filled = before - _zeros(block)
        return done | ({"zeros": filled} if filled > 0 else {})

    def outside(self, rest: Outside) -> None:
        if not self.stream:
            return
        rest.untie()
        for link in rest.links():
            turn = self._stream(link.producer, link.readers[0].in_features)
            for table in rest.tables:
                table.weight.data.copy_(turn(table.weight.data))
            link.fold_(turn)

    def apply(self, model: nn.Module, run: Run) -> Record:
        record = super().apply(model, run)
        if filled := sum(of.get("zeros", 0) for of in record.meta["blocks"]):
            note = f"{filled:,} weights that were exactly 0 are not any more: a rotation mixes them with the others"
            if run.layers is None and run.ranks.is_main:
                LOG.warning("%s: %s", self.name, note)
            record.meta["notes"] = [note]
        return record

    def _turn_stream(self, block: Block) -> list[str]:
        """The roles of the norms that were folded on the way."""
        folded = []
        for link in block.links():
            if isinstance(link.producer, Norm):
                link.fold_(self._stream(link.producer, link.readers[0].in_features))
                folded.append(link.producer.role)
        for writer in (block.attn_out, block.ffn_out):
            if writer is not None:
                writer.turn_rows_(self._stream(next(iter(block.norms.values())), writer.out_features))
        return folded

    def _turn_heads(self, block: Block) -> int:
        """How many heads of v were turned, each by the same rotation: a head of v is read by several of q."""
        for link in block.links():
            if link.readers[0] is block.attn_out:
                link.turn_(Rotation(block.head_dim, self.seed))
                return block.kv_heads
        return 0

    def _stream(self, norm: Norm, width: int) -> Rotation:
        return Rotation(self.channels or width, self.seed, mean=norm.kind == "layer")


def _zeros(block: Block) -> int:
    """Entries of the block's weights that are exactly 0."""
    return sum(p.weight.numel() - int(p.weight.count_nonzero()) for p in block.projections())
