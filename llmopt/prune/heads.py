"""Any head score as a criterion: the KV groups, or query heads, leave whose heads score least.

    score(group) = mean (`of_group: max`: the largest) of the scores of its query heads;    a query head: its own score

The scores are those of a heads.* step before this one, by its name, or of a file that `llmopt heads` wrote. Importance
of heads for the loss (heads.gradient; Michel et al., 2019, arXiv:1905.10650) is made for this; scores that tell what a
head does, such as heads.retrieval, keep these heads and let the rest go. Scores compare across layers as they are
(`normalize: none`): most steps have made them comparable, some are negative.
"""
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration import head_scores
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks
from llmopt.parts import Several, register
from llmopt.prune.base import Criterion, Scores
from llmopt.prune.groups import members


@register("prune.heads")
@dataclass(frozen=True)
class Heads(Criterion):
    """No data needed but for the refit."""

    heads: str = Field("heads.gradient", description="name of a score step, or a .json or .safetensors file of scores")
    units: Several[Literal["kv_groups", "q_heads"]] = Field(("kv_groups",), description="what may leave")
    normalize: Literal["lamp", "layer", "none"] = Field(
        "none", description="how scope: global makes the scores of different layers comparable")
    of_group: Literal["mean", "max"] = Field("mean", description="what a KV group has of its query heads' scores")

    @property
    def by_weights(self) -> bool:
        return False

    def rate_all(self, model: nn.Module, run: Run) -> list[Scores]:
        found = head_scores.find(self.heads, run, model)
        return [{unit: self._of(unit, block, own) for unit in self.units if members(block, unit)}
                for block, own in zip(blocks(model), found, strict=True)]

    def _of(self, unit: str, block: Block, scores: Tensor) -> Tensor:       # [H] -> [units]
        if unit == "q_heads":
            return scores
        groups = scores.view(block.kv_heads, -1)
        return groups.mean(1) if self.of_group == "mean" else groups.amax(1)
