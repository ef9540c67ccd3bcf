"""The calibration data of a run: read, or sampled from its model, which for that time must be in memory as a whole."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmopt.calibration import data
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.model.computing import choose
from llmopt.model.loading import load_dense
from llmopt.recipe.reader import Recipe
from llmopt.scale.available import available

LOG = logging.getLogger(__name__)
WAY_OUT = "give data: {name: text, path: FILE}, or rows that were sampled elsewhere: {name: ids, path: ROWS.jsonl}"


def load_batches(recipe: Recipe, model: nn.Module, tokenizer: Any, sampler: Sampler) -> list[data.Batch] | None:
    """The calibration data, if a step asks for it; `sampler` draws rows of the model itself, streamed or not."""
    if not any(step.needs_data for step in recipe.steps):
        return None
    if recipe.data.name != "self":
        batches = data.load(recipe.data, model.config, tokenizer)
    else:
        with whole(recipe, model, sampler):
            batches = data.load(recipe.data, model.config, tokenizer, sampler)
    LOG.info("calibration: %(samples)s rows, %(tokens)s tokens", data.amount(batches))
    return batches


@contextmanager
def whole(recipe: Recipe, model: nn.Module, sampler: Sampler) -> Iterator[None]:
    """Inside, the sampler's model has its weights: a streamed one is loaded for that time, by rank 0 alone.

    Each token of a row takes all weights, so that from a model larger than memory, and be all rows drawn at once, the
    disk is read `length` times: for 7B parameters 3.5 TB. That is refused.
    """
    if not next(model.parameters()).is_meta or not sampler.ranks.is_main:
        yield
        return
    needed, free = shards.tensor_bytes(dict(model.named_parameters())), available()
    if needed > free:
        raise LlmoptError(f"data (self): sampling rows takes the whole model in memory, {needed / 1e9:.1f} GB, "
                          f"{free / 1e9:.1f} GB are available; {WAY_OUT}")
    try:
        sampler.model, _ = load_dense(recipe.model)
        choose(sampler.model, recipe.model.compute_dtype, recipe.model.device)
        yield
    finally:
        sampler.model = model
