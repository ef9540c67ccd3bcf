"""Calibration batches and logits for the tests of this folder."""
import torch

from tests.tiny import ids


def batches(rows: int = 6, length: int = 24) -> list[dict]:
    """Two batches; the first row is right-padded from its middle on."""
    tokens = ids(rows, length)
    mask = torch.ones_like(tokens)
    mask[0, length // 2:] = 0
    return [{"input_ids": tokens[i::2], "attention_mask": mask[i::2]} for i in range(2)]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=ids(2, seed=5), use_cache=False).logits
