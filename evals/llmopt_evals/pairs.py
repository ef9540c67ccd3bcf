"""The score `fidelity` of two models by their names: looked at beforehand, opened one after the other, its figures in
the form of lm-eval's results, so that tables, files and cards treat them like any other task's.
"""
import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from llmopt.calibration import sampling
from llmopt.calibration.data import Batch, check_source, held_out
from llmopt.calibration.given import batches_of
from llmopt.checkpoint.facts import FILE, read_facts
from llmopt.errors import LlmoptError
from llmopt.model.loading import read_config, resolve
from llmopt.recipe.sources import source
from llmopt.scale.available import available
from llmopt.scale.processes import Ranks
from llmopt.specs import DataSpec, EvalSpec, ModelSpec
from llmopt_evals.fidelity import LENGTH, NAME, ROWS, Draw, Figures, Opened, compare, figures
from llmopt_evals.large import beside, memory_bytes, opened
from llmopt_evals.preflight import tokenizer_of
from llmopt_evals.world import speaks_world

LOG = logging.getLogger("llmopt")
TOO_LARGE = ("a model larger than memory cannot write the rows that it is scored on: each token would take all its "
             "weights; data: {name: text, path: FILE} gives them")
Results = dict[str, Any]
Given = ModelSpec | tuple[nn.Module, Any]               # by its name, or in memory with its tokenizer


class Pair(NamedTuple):
    """A dense model, what was made of it, and the data on which the two are compared."""

    dense: Given
    compressed: Given
    data: Any                               # a DataSpec, or rows that a program has at hand (calibration/given.py)


def results(dense: Given, compressed: Given, data: Any, wanted: EvalSpec,
            ranks: Ranks = Ranks()) -> tuple[Results, Results]:     # noqa: B008  frozen
    """(results of the dense model, of the compressed one) on rows of `data` that no calibration saw; on every rank.

    data: see Pair; rows at hand are taken as they are.

    wanted: its `limit` is the number of rows, its `batch_size` how many are read together at most.
    """
    near = resolve(compressed) if isinstance(compressed, ModelSpec) else "model"
    rows = compare(_opened(dense), _opened(compressed), draw(data, wanted.limit or ROWS), beside(Path(near)), ranks,
                   wanted.batch_size)
    before, after = figures(rows)
    return as_results(before, len(rows)), as_results(after, len(rows))


def _opened(model: Given) -> Opened:
    return opened(model, False) if isinstance(model, ModelSpec) else nullcontext(model)


def asked_for(tasks: list[str], models: list[ModelSpec], data: str | None) -> Pair | None:
    """The two models to be compared and their data, if `fidelity` is among the tasks; looked at before the work.

    models: one, which then must tell what it was made of, or the compressed and the dense one. data: see
    `recipe.sources`; None: what the compressed model was calibrated with, or what its dense one writes itself.
    """
    if NAME not in tasks:
        if data is not None:
            raise LlmoptError(f"--data is what {NAME} draws rows from, and --tasks does not name it")
        return None
    return pair_of(models[0], models[1] if len(models) > 1 else None, data)


def pair_of(compressed: Given, dense: Given | None, data: Any) -> Pair:
    """Two models with the data on which they are compared; see `asked_for`."""
    named = isinstance(compressed, ModelSpec)
    if dense is None and not named:
        raise LlmoptError(f"{NAME} measures a model against the dense one that it was made of: compare=DENSE")
    dense = source_of(compressed) if dense is None else dense
    if named and isinstance(dense, ModelSpec):
        check(dense, compressed)
    if data is not None and not isinstance(data, (str, os.PathLike)):
        return Pair(dense, compressed, data)
    word = None if data is None else os.fspath(data)
    spec = data_of(compressed if named else None, word).of(dense.id if isinstance(dense, ModelSpec) else "")
    check_source(spec)
    return Pair(dense, compressed, spec)


def data_of(compressed: ModelSpec | None, given: str | None) -> DataSpec:
    """What the calibration of a model read, or another source, of which it saw nothing so far as is known.

    A model in memory does not say what it saw: of rows that its dense model writes, as many as calibration usually has.
    """
    recorded = _recorded(compressed).get("data", {}) if compressed else {}
    asked = source(given) if given is not None else {}
    if all(recorded.get(key) == value for key, value in asked.items()):
        return DataSpec(**recorded)
    own = compressed is None and asked.get("name") in (None, "self")
    return DataSpec(**asked) if own else DataSpec(**asked, samples=1)       # the fewest rows that calibration can see


def by_name(pair: Pair | None, wanted: EvalSpec, ranks: Ranks) -> dict[str, Results]:
    """{name of the model: its results}; nothing for no pair."""
    if pair is None:
        return {}
    LOG.info("comparing %s with %s", pair.compressed.id, pair.dense.id)
    before, after = results(*pair, wanted, ranks)
    return {pair.dense.id: before, pair.compressed.id: after}


def draw(data: Any, rows: int) -> Draw:
    """What draws `rows` rows for a model; one that does not know the world, where that is the source, writes its own.

    They have LENGTH tokens, rows that the model writes half as many, or what `data.length` says if that is more.
    """
    def drawn(model: nn.Module, tokenizer: Any) -> list[Batch]:
        if not isinstance(data, DataSpec):
            return batches_of(data, tokenizer, model.config)
        foreign = data.name == "world" and not speaks_world(tokenizer)
        spec = replace(data, name="self") if foreign else data
        if spec.name in (None, "self") and any(parameter.is_meta for parameter in model.parameters()):
            raise LlmoptError(f"{NAME}: {TOO_LARGE}")
        usual = sampling.LENGTH if spec.name in (None, "self") else LENGTH
        length = min(max(usual, spec.length or 0), model.config.get_text_config().max_position_embeddings)
        return held_out(spec, tokenizer, model, rows, length)
    return drawn


def obstacle(dense: ModelSpec, data: DataSpec) -> str | None:
    """Why `fidelity` could not draw its rows in the end, where the dense model is to write them itself.

    Raises LlmoptError for a file that is not there, or a dataset that cannot be had.
    """
    check_source(data)
    folder = Path(resolve(dense))
    if data.name not in (None, "self") or dense.device != "cpu" or not folder.is_dir():
        return None
    return TOO_LARGE if memory_bytes(folder, dense.dtype) > available() else None


def as_results(found: Figures, rows: int) -> Results:
    """Figures as lm-eval returns those of a task."""
    values = {"alias": NAME}
    for metric, (value, error) in found.items():
        values |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
    better = {metric: metric in ("agreement", "loglikelihood_change") for metric in found}
    return {"config": {}, "results": {NAME: values}, "n-samples": {NAME: {"original": rows, "effective": rows}},
            "higher_is_better": {NAME: better}}


def joined(first: Results | None, second: Results | None) -> Results:
    """Results of different tasks in one."""
    first, second = first or {}, second or {}
    both = {key for key in first if isinstance(first[key], dict) and isinstance(second.get(key), dict)}
    return {**second, **first} | {key: first[key] | second[key] for key in both}


def check(dense: ModelSpec, compressed: ModelSpec) -> None:
    """Raise LlmoptError, before a weight is read, for two models whose predictions are not about the same tokens."""
    sizes = [read_config(spec)[1].get_text_config().vocab_size for spec in (dense, compressed)]
    words = [tokenizer_of(spec) for spec in (dense, compressed)]
    if sizes[0] != sizes[1]:
        raise LlmoptError(f"{NAME}: {compressed.id} has a vocabulary of {sizes[1]:,} tokens, {dense.id} of "
                          f"{sizes[0]:,}; only models of one vocabulary can be compared")
    if None not in words and words[0].get_vocab() != words[1].get_vocab():
        raise LlmoptError(f"{NAME}: the tokenizers of {compressed.id} and {dense.id} have different words; only models "
                          "of one vocabulary can be compared")


def source_of(compressed: ModelSpec) -> ModelSpec:
    """The dense model that a checkpoint of llmopt was made of, as it has been recorded.

    Raises LlmoptError where nothing is recorded, or the model is not there any more.
    """
    folder = Path(resolve(compressed))
    if not (folder / FILE).is_file():
        raise LlmoptError(f"{NAME} measures a model against the dense one that it was made of, and {compressed.id} "
                          "does not tell which: --compare DENSE")
    recorded = _recorded(compressed).get("model", {})
    name = recorded.get("id") or read_facts(folder)["base_model"]
    found = replace(compressed.at(str(name)), revision=None, **{
        key: recorded[key] for key in ("gguf_file", "dequantize", "adapter") if key in recorded})
    try:
        read_config(found)
    except LlmoptError as error:
        raise LlmoptError(f"{NAME}: {compressed.id} was made of {name}, which cannot be had any more ({error}); "
                          "--compare DENSE names another copy") from error
    return found


def _recorded(compressed: ModelSpec) -> dict[str, dict[str, Any]]:
    """The sections of the recipe that a checkpoint was made by."""
    folder = Path(resolve(compressed))
    recipe = read_facts(folder).get("recipe") if (folder / FILE).is_file() else None
    return {key: value for key, value in recipe.items() if isinstance(value, dict)} if isinstance(recipe, dict) else {}
