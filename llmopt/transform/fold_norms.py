"""Folded norms: gains and biases of the norms move into the projections that read them.

    W (g n + b) + c  =  (W g) n + (W b + c)            n: the normalised stream, g: 1 + weight in Gemma

Afterwards a norm only normalises, which is what rotations of the residual stream need (SliceGPT, arXiv:2401.15024;
QuaRot, arXiv:2404.00456), and a column of a weight counts as much as its input does. The final norm is folded into
the output head, which gets a weight of its own where it was tied to the embeddings: the file grows by it. A bias stays
behind, as b / g, where a reader has none. Norms that feed no reader stay: those behind the writers of Gemma, and those
in front of experts.
"""

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Block, refuse_folding
from llmopt.model.links import Link, Norm
from llmopt.model.outside import Outside
from llmopt.parts import register
from llmopt.transform.base import Figures, Transform


@register("transform.fold_norms")
@dataclass(frozen=True)
class FoldNorms(Transform):
    """No data needed."""

    head: bool = Field(True, description="the final norm too, into the output head, which unties a tied one")

    def refuse(self, model: nn.Module) -> None:
        refuse_folding(model)

    def block(self, block: Block, visit: Visit | None, run: Run) -> Figures:
        return {"folded": [link.producer.role for link in _folded(block.links())]}

    def outside(self, rest: Outside) -> None:
        if self.head:
            rest.untie()
            _folded(rest.links())


def _folded(links: list[Link]) -> list[Link]:
    """Fold the links that begin at a norm, and give them."""
    found = [link for link in links if isinstance(link.producer, Norm)]
    for link in found:
        link.fold_()
    return found
