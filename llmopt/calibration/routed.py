"""What the experts of a block read: the tokens that the router has sent to each.

The call of the experts' module is caught once for all of them, and held as activations are. The first matrices read
those tokens; what the later ones read is seen by running one expert alone, behind the first ones as they are by then.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.expert_weights import inputs, known
from llmopt.model.experts import Experts

ROWS = 4096         # tokens that go through an expert together


class Routing:
    """The tokens in front of a block's experts that this process has; `sent` [E]: tokens of each, of all processes."""

    def __init__(self, visit: Visit, run: Run):
        self.experts: Experts = known(visit.block.module, visit.block.name)
        self.x: list[Tensor] = []
        self.index: list[Tensor] = []                       # [N, k] of each batch
        hold, count = run.memory.keeper(), self.experts.count
        sent = torch.zeros(count, dtype=torch.float64)
        for args, kwargs, mask in visit.calls_of(self.experts.module):
            x, index, _ = self.experts.routed(args, kwargs)
            real = mask.reshape(-1).to(x.device)
            self.x.append(hold(x[real]))
            self.index.append(index[real].cpu())
            sent += torch.bincount(self.index[-1].flatten(), minlength=count)[:count]   # a number beyond: to none
        self.sent = run.ranks.sum_(sent).long().tolist()

    def shares(self, expert: int, least: int) -> bool:
        """True for an expert that was sent fewer tokens than `least`, and is given all; raises LlmoptError for none."""
        if not self.sent[expert] and not least:
            raise LlmoptError(f"{self.experts.name}: expert {expert} was sent no token of the calibration data: more "
                              "data, min_tokens: 1 (it is solved with the tokens of its layer), or "
                              "calibrate_all_experts: true")
        return self.sent[expert] < least

    def read(self, expert: int, parameter: str, everything: bool,
             weights: list[Tensor] | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What one expert's matrix in the stack `parameter` reads [n, in], of some tokens after the others, and their
        weights [n]; everything: of all tokens of the layer, not only of those sent to it.
        """
        device = getattr(self.experts.module, parameter).device
        for batch, (x, index) in enumerate(zip(self.x, self.index, strict=True)):
            rows = torch.arange(len(x)) if everything else (index == expert).any(1).nonzero().flatten()
            for some in rows.split(ROWS) if len(rows) else ():
                share = None if weights is None else weights[batch][some.to(weights[batch].device)]
                yield inputs(self.experts, expert, x[some.to(x.device)].to(device), parameter), share
