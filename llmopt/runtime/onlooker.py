"""A kv method that looks at what a text leaves in the cache, and drops none of it."""
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.method import Record
from llmopt.model.blocks import decoder
from llmopt.runtime.attach import CacheMethod, attached
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment


class Onlooker(CacheMethod):
    """Looks at layers in `compress`, with all queries; what it asks to be kept beside is its own to forget."""

    name, every = "onlooker", None

    def to_dict(self) -> dict[str, Any]:
        return {self.name: {}}

    def queries(self) -> int | None:
        return None

    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        """Nothing is dropped."""


@torch.no_grad()
def show(model: nn.Module, ids: Tensor, onlooker: Onlooker) -> None:
    """Let `onlooker` look at a text `ids` [n]."""
    with attached(model, onlooker):
        decoder(model)(input_ids=ids[None].to(model.device), use_cache=True)
