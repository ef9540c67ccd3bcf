"""The calibration data of a run: read, or sampled from its model, which for that time must be in memory as a whole."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmopt.calibration import data
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.method import Method
from llmopt.model.computing import choose
from llmopt.model.loading import load_dense
from llmopt.scale.available import available
from llmopt.specs import DataSpec, ModelSpec

WAY_OUT = "give data: {name: text, path: FILE}, or rows that were sampled elsewhere: {name: ids, path: ROWS.jsonl}"


def needs_data(steps: Sequence[Method]) -> bool:
    """True if a step looks at calibration data."""
    return any(step.needs_data for step in steps)


def load_batches(spec: DataSpec, steps: Sequence[Method], source: ModelSpec,
                 sampler: Sampler) -> list[data.Batch] | None:
    """The calibration data, if a step asks for it; `sampler` knows the model, whose own specification is `source`."""
    return batches_of(spec, source, sampler) if needs_data(steps) else None


def batches_of(spec: DataSpec, source: ModelSpec, sampler: Sampler) -> list[data.Batch]:
    """The calibration data, asked for or not."""
    config, tokenizer = sampler.model.config, sampler.tokenizer
    if spec.name != "self":
        return data.load(spec, config, tokenizer)
    with whole(source, sampler):
        return data.load(spec, config, tokenizer, sampler)


@contextmanager
def whole(source: ModelSpec, sampler: Sampler) -> Iterator[None]:
    """Inside, the sampler's model has its weights: a streamed one is loaded for that time, by rank 0 alone.

    Each token of a row takes all weights, so that from a model larger than memory, and be all rows drawn at once, the
    disk is read `length` times: for 7B parameters 3.5 TB. That is refused.
    """
    model = sampler.model
    if not next(model.parameters()).is_meta or not sampler.ranks.is_main:
        yield
        return
    needed, free = shards.tensor_bytes(dict(model.named_parameters())), available()
    if needed > free:
        raise LlmoptError(f"data (self): sampling rows takes the whole model in memory, {needed / 1e9:.1f} GB, "
                          f"{free / 1e9:.1f} GB are available; {WAY_OUT}")
    try:
        sampler.model, _ = load_dense(source)
        choose(sampler.model, source.compute_dtype, source.device)
        yield
    finally:
        sampler.model = model
