"""How far a group of blocks, one of which is gone, is from what it was.

    logits     mean_t KL(before || now) of the model's predictions; before: when all blocks were there
    relative   mean_t |out_t - y_t|^2 / |y_t|^2     each token by its own size: massive activations are not all of it
    kl         mean_t KL(softmax(y_t) || softmax(out_t)) over the features

The stream behind a group can come nearer while predictions go further away: on llmopt/reference they did.
"""
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from llmopt.calibration.calls import decoded_behind
from llmopt.calibration.data import Batch
from llmopt.calibration.logits_loss import LogitsLoss
from llmopt.calibration.walk import Visit
from llmopt.prune.learned import Learned


class GroupLoss:
    """How far the group is from what it wrote, with the parameters that these parts stand for.

    Call it with the index of a batch for that one's part of the mean over all tokens. visits: of the blocks that stay.
    """

    def __init__(self, visits: list[Visit], wanted: list[Tensor], parts: list[Learned], how: str):
        self.visits, self.wanted, self.parts, self.how = visits, wanted, parts, how
        self.tokens = sum(int(mask.sum()) for mask in visits[0].masks)

    def __call__(self, index: int) -> Tensor:
        values, hidden = {part.key: part.value() for part in self.parts}, self.visits[0].inputs[index]
        for visit in self.visits:
            prefix = f"{visit.block.name}."
            own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            one = Visit(visit.model, visit.block, [hidden], [visit.calls[index]], [visit.masks[index]])
            hidden = one.forward(0, own)
        return self.apart(hidden, index)

    def apart(self, hidden: Tensor, index: int) -> Tensor:                              # [B, T, E] -> ()
        """How far the group is from what it wrote for a batch if it writes `hidden`."""
        mask = self.visits[0].masks[index].to(hidden.device)
        out, then = hidden[mask].float(), self.wanted[index].to(hidden.device)[mask].float()             # [N, E]
        if self.how == "kl":
            return kl_div(out.log_softmax(-1), then.log_softmax(-1), log_target=True, reduction="sum") / self.tokens
        size = then.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((out - then).square().sum(1) / size).sum() / self.tokens


class PredictionLoss(GroupLoss):
    """How far the model's predictions are from those with all blocks.

    visits: the blocks behind the group, too. wanted: what the last block is to write.
    """

    @torch.no_grad()
    def __init__(self, visits: list[Visit], wanted: list[Tensor], parts: list[Learned], batches: list[Batch]):
        super().__init__(visits, wanted, parts, "logits")
        self.model, self.batches = visits[0].model, batches
        dense = [decoded_behind(self.model, batch, then) for batch, then in zip(batches, wanted, strict=True)]
        self.logits = LogitsLoss(self.model, batches, dense, dict)

    def apart(self, hidden: Tensor, index: int) -> Tensor:
        return self.logits.behind(decoded_behind(self.model, self.batches[index], hidden), index)
