"""What stands in for a cut while plans are tried: the writer with zeros for the units that leave.

All that a unit does goes through its columns of the writer, so zeros there do what the cut will do. With the refit, the
columns that stay are fitted as refit.py does it, with one ridge for all cuts of the writer; a bias is fitted with them.
"""
from typing import Any

import torch
from torch import Tensor

from llmopt.calibration.trials import Weights, in_block
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection
from llmopt.prune.allocate import Units
from llmopt.prune.refit import Sums, chosen, held_out, placed, solve, with_bias, writers
from llmopt.prune.surgery import layer_plan

Ridges = dict[str, float | None]            # by the name of a writer; None: it is best left as it is


class StandIns:
    """The stand-ins of one block.

    data: a visit with the calibration data, for stand-ins that are refitted; None: cut alone. ridges: filled where a
    writer's is not known yet. ahead: stand-ins behind which those here read.
    """

    def __init__(self, block: Block, units: list[Units], run: Run, data: Visit | None, ridges: Ridges,
                 ahead: Weights | None = None):
        self.block, self.ridges = block, ridges
        self.units = [u for u in units if u.layer == block.index]
        able = [u for u in self.units if u.most]
        self.read = _read(data, [self._cut(u, u.most)[0] for u in able], run, ahead or {}) if data and able else {}

    def weights(self, removed: dict[str, int]) -> dict[str, Tensor]:
        """By the name of a weight or bias, what it is where so many units of each kind leave the block."""
        found: dict[str, Tensor] = {}
        for u in self.units:
            if removed.get(u.kind):
                found |= self._of(u, removed[u.kind])
        return found

    def _cut(self, u: Units, gone: int) -> tuple[Projection, Tensor]:
        """The writer, and its columns that stay."""
        return writers(self.block, layer_plan([(u, gone)]))[0]

    def _of(self, u: Units, gone: int) -> dict[str, Tensor]:
        writer, kept = self._cut(u, gone)
        kept, old = kept.to(writer.weight.device), writer.weight
        ridge = self._ridge(u, writer)
        if ridge is None:
            return {writer.name: placed(old[:, kept], kept, old)}
        whole, gram = self.read[writer.name][1:]
        found = solve(whole, gram, _and_bias(kept, whole, old), ridge).to(old.dtype)
        weights = {writer.name: placed(found[:, :len(kept)], kept, old)}
        return weights if writer.bias is None else weights | {f"{writer.path}.bias": found[:, -1]}

    def _ridge(self, u: Units, writer: Projection) -> float | None:
        """The one that does best on rows held out where half of what may leave at most has left."""
        if writer.name not in self.read:
            return None
        if writer.name not in self.ridges:
            sums, whole, _ = self.read[writer.name]
            half = min((len(u.scores) - n for n in u.allowed[1:]), key=lambda gone: abs(gone - u.most / 2))
            kept = self._cut(u, half)[1].to(whole.device)
            self.ridges[writer.name] = chosen(whole, _and_bias(kept, whole, writer.weight), sums)[0]
        return self.ridges[writer.name]


def in_turn(data: Visit, units: list[Units], run: Run, removed: dict[str, int], ridges: Ridges) -> Weights:
    """The stand-ins of a block, refitted on what it reads in `data`, the FFN's behind that of the attention."""
    found: dict[str, Tensor] = {}
    for kinds in (("kv_groups", "q_heads"), ("ffn",)):
        some = [u for u in units if u.kind in kinds and removed.get(u.kind)]
        found |= StandIns(data.block, some, run, data, ridges, found).weights(removed)
    return found


def _read(data: Visit, projections: list[Projection], run: Run, ahead: Weights
          ) -> dict[str, tuple[Sums, Tensor, Tensor]]:
    """By the name of a writer: sums over what it reads; its weight, and bias, as one matrix; all of its Gram matrix."""
    apart = held_out(data.masks, run.ranks)
    sums = {p.name: Sums(apart, run.ranks, int(p.bias is not None)) for p in projections}
    data.observe({name: one.add for name, one in sums.items()}, weights=in_block(data.block, ahead))
    found: dict[str, Any] = {}
    for projection in projections:
        one, whole = sums[projection.name], with_bias(projection)
        one.gram.join(whole)
        found[projection.name] = one, whole, one.all(whole)
    return found


def _and_bias(kept: Tensor, whole: Tensor, weight: Tensor) -> Tensor:
    """The columns of `whole` that stay: those of the weight, and that of the bias, where there is one."""
    return torch.cat([kept, torch.arange(weight.shape[1], whole.shape[1], device=kept.device)])
