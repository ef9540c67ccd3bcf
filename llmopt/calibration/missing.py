"""What is missing at a weight, token by token, since the blocks and groups before it were edited.

    m_t = x~_t - x_t                            for a reader of the residual stream: in its inputs
    m_t = W (x~_t - x_t) + (r~_t - r_t)         for a writer: in its outputs, and in the stream that they are added to

x~ and r~ are of the unedited model (beside.py), x and r of the edited one; r counts where a block adds what it writes
as it is, norms in front (Form "pre"). The sums M = (2 / N) sum_t r_t m_t x_t^T lead to the weight that would make up
for it best: (M or W M) H^-1 more. Li et al., GPTAQ (arXiv:2504.02692) have the first line.
"""
from collections.abc import Collection

import torch
from torch import Tensor

from llmopt.calibration.second_moments import blocks_of
from llmopt.calibration.walk import Places, Visit
from llmopt.model.blocks import Block, Projection
from llmopt.scale.processes import Ranks


def places(block: Block, names: Collection[str], residual: bool) -> Places:
    """What must be seen of an unedited block for the weights in `names`, by name."""
    readers = [group[0] for group in block.groups() if any(p.name in names for p in group)]
    streams = [found for reader in readers for found in _stream(block, reader, residual).items()]
    return {reader.name: reader.module for reader in readers} | dict(streams)


def _stream(block: Block, writer: Projection, residual: bool) -> Places:
    """The place that reads the stream which the outputs of `writer` are added to; nothing for any other projection."""
    if not residual or block.form != "pre":
        return {}
    if block.attn_out and writer.name == block.attn_out.name:
        return {block.name: block.module}
    norm = block.norms.get("ffn_in") if block.ffn_out and writer.name == block.ffn_out.name else None
    return {} if norm is None else {norm.name: norm.module}


class Missing:
    """M of one projection, over the tokens of all processes; summed up in float64, as Gram's sums are.

    matrix: M [in or out, in] float32 once all have come, None where nothing is missing.
    """

    def __init__(self, visit: Visit, reader: Projection, residual: bool, ranks: Ranks):
        writers = [p.name for p in (visit.block.attn_out, visit.block.ffn_out) if p is not None]
        self.weight = reader.weight.float() if reader.name in writers else None
        self.stream = _stream(visit.block, reader, residual)
        self.inputs = iter(visit.dense.pop(reader.name))
        self.streams = [iter(visit.dense.pop(name)) for name in self.stream]
        self.now: Tensor | None = None                      # the stream in the edited model, of the batch at work
        self.sums: Tensor | None = None
        self.matrix: Tensor | None = None
        self.tokens, self.ranks = 0, ranks

    @property
    def of_outputs(self) -> bool:
        """True for a writer."""
        return self.weight is not None

    def see_stream(self, x: Tensor) -> None:
        """The stream [N, E] of the batch whose inputs come next."""
        self.now = x

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in the inputs [N, in] of the next batch; weights [N] scale the tokens' shares."""
        x = x.float()
        self.tokens += len(x)
        lack = next(self.inputs).to(x.device).float() - x
        if self.weight is not None:
            lack = lack @ self.weight.T
        for stream in self.streams:
            lack += next(stream).to(x.device).float() - self.now.float()
        if weights is not None:
            lack *= weights.unsqueeze(1)
        self._begin(lack.shape[1], x)
        for block in blocks_of(x.shape[1]):
            self.sums[:, block].add_(lack.T @ x[:, block])

    def join(self, like: Tensor) -> None:
        """Take in what the other ranks have seen. like: the weight [out, in]."""
        self._begin(like.shape[0] if self.of_outputs else like.shape[1], like)
        for block in blocks_of(like.shape[1]):
            self.sums[:, block] = self.ranks.sum_(self.sums[:, block].contiguous())
        tokens = sum(self.ranks.gather(self.tokens))
        if bool(self.sums.any()):
            self.matrix = self.sums.float().mul_(2 / tokens)
        self.sums = self.now = self.inputs = None       # all of the tokens, which nobody reads again
        self.streams = []

    def _begin(self, size: int, like: Tensor) -> None:
        if self.sums is None:
            self.sums = torch.zeros(size, like.shape[-1], dtype=torch.float64, device=like.device)
