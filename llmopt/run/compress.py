"""`llmopt.compress` and `llmopt.dry_run`: what Python code has at hand, brought into the form that a run takes."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt.calibration import data as calibration
from llmopt.calibration.given import batches_of
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError, naming_arguments
from llmopt.files.packaged import EMBEDDED
from llmopt.method import Method, Run
from llmopt.model.computing import choose
from llmopt.model.loading import load_dense, load_tokenizer, resolve
from llmopt.model.usable import check_model
from llmopt.progress import Progress, silent
from llmopt.recipe.given import is_recipe, methods_of, recipe_of, scheme_words
from llmopt.recipe.one_line import entries
from llmopt.recipe.reader import Recipe
from llmopt.recipe.sources import source
from llmopt.recipe.words import Words
from llmopt.run import dry_run as rehearsal
from llmopt.run import pipeline
from llmopt.run.foretold import Foretold
from llmopt.run.report import Report
from llmopt.specs import DataSpec

Named = str | os.PathLike
Batches = list[calibration.Batch]


@naming_arguments
def compress(model: nn.Module | Named, steps: Any = None, data: Any = None, seed: int | None = None,
             progress: Progress = silent, tokenizer: Any = None, *, scheme: str | None = None,
             bits: float | None = None, dtype: str | torch.dtype | None = None, device: str | None = None,
             output: Named | None = None, batches: Any = None) -> Report:
    """Compress a model: one in memory is edited in place, one that is named by folder or hub name is loaded first.

        report = llmopt.compress("MODEL", scheme="W4A16")           # report.model, report.tokenizer
        report.save("out")
        llmopt.compress(model, [llmopt.quant.GPTQ(bits=3), llmopt.kv.SnapKV(ratio=0.5)], texts, tokenizer=tokenizer)

    model: a model of transformers, or the name of one. A pair (model, tokenizer), as llmopt.load gives it, will do.
    steps: one or several of: a method (`llmopt.quant.RTN(bits=4)`), its class, its name ("quant.rtn"), {name: fields}.
        Or a whole recipe: a packaged name ("quickstart"), a file, its plain data; or a scheme ("W4A16").
    data: calibration data, where a step asks for it: texts, token ids (a tensor, lists, a BatchEncoding, a DataLoader),
        a datasets.Dataset, the path of a text, a source ("self": rows sampled from the model, the default), or a
        recipe's `data` section.
    scheme, bits: in the place of steps, as the command's --scheme and --bits.
    dtype, device: of a model that is loaded here. seed: of every random draw. progress: see llmopt.progress.
    output: also write the checkpoint there; a model that is named is then run as by llmopt.run, scored too.
    batches: another word for data.

    Raises LlmoptError for bad input. An error in the middle leaves a model whose weights were edited unusable by name.
    """
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    given = data if batches is None else batches
    words = {"scheme": scheme, "bits": bits}
    if isinstance(model, (str, os.PathLike)):
        words |= {"dtype": dtype, "device": device, "seed": seed}
        return _named(os.fspath(model), steps, given, words, progress, output)
    if dtype is not None or device is not None:
        raise LlmoptError("dtype and device are for a model that is loaded by its name; a model in memory has its own")
    check_model(model)
    pipeline.refuse_compressed(model)
    methods, spec, usual, said = _planned(model, steps, words)
    tokenizer = tokenizer or _beside(model, methods, given)
    found = _batches(given, spec, methods, Sampler(model, tokenizer, progress=progress))
    run = Run(found, seed=usual if seed is None else seed, progress=progress, tokenizer=tokenizer)
    report = pipeline.apply_steps(model, methods, run)
    report.made, report.said = (model, tokenizer), said
    if output is not None:
        report.save(output)
    return report


@naming_arguments
def dry_run(recipe: Any = None, steps: Any = None, *, model: Named | None = None, data: Any = None,
            scheme: str | None = None, bits: float | None = None) -> Foretold:
    """What a run will do, how large its checkpoint will be, the memory and time it will take; nothing is written.

        llmopt.dry_run("MODEL", "W4A16")
        llmopt.dry_run("recipe.yaml", model="MODEL")

    recipe: as the `steps` of llmopt.compress, with `model` as in llmopt.run; or, as there, the model first and then the
    steps, a scheme or bits. What comes back holds what `llmopt compress --dry-run --json` prints.
    """
    if model is None and not is_recipe(recipe) and (steps is not None or scheme is not None or bits is not None):
        model, recipe = recipe, steps
    elif steps is not None:
        raise LlmoptError("a recipe and steps both say what to do; give one of them")
    return rehearsal.dry_run(recipe_of(recipe, _text(model), {"scheme": scheme, "bits": bits, "data": _word(data)}))


def _named(model: str, steps: Any, data: Any, words: dict[str, Any], progress: Progress,
           output: Named | None) -> Report:
    """`compress` of a model that is not loaded yet."""
    if output is not None:
        import llmopt.run

        return llmopt.run(recipe_of(steps, model, words | {"data": _word(data)}), output, progress=progress)
    said = isinstance(data, (str, os.PathLike)) or data is None
    recipe = recipe_of(steps, model, words | {"data": _word(data)} if said else words)
    if isinstance(data, Mapping) and _is_named(data):
        recipe, said = replace(recipe, data=DataSpec(**data)), True
    loaded, tokenizer = load_dense(recipe.model)
    choose(loaded, recipe.model.compute_dtype, recipe.model.device)
    found = _batches(None if said else data, recipe.data, recipe.steps, Sampler(loaded, tokenizer, progress=progress))
    run = Run(found, seed=recipe.seed, progress=progress, tokenizer=tokenizer)
    report = pipeline.apply_steps(loaded, list(recipe.steps), run)
    report.made, report.recipe = (loaded, tokenizer), recipe if said else None      # texts are in no recipe
    report.said = _saved(recipe)
    return report


def _saved(recipe: Recipe) -> dict[str, str]:
    return {"format": recipe.format, "max_shard_size": recipe.max_shard_size}


def _planned(model: nn.Module, steps: Any, words: dict[str, Any]) -> tuple[list[Method], DataSpec, int, dict[str, str]]:
    """(methods, calibration data, seed, how it is to be saved) for a model in memory."""
    if is_recipe(steps):
        recipe = recipe_of(steps, None, words)
        return list(recipe.steps), recipe.data, recipe.seed, _saved(recipe)
    asked = Words(**scheme_words(steps, words))
    return methods_of(entries(asked, lambda: model) if asked.steps else steps), DataSpec(), 0, {}


def _batches(given: Any, spec: DataSpec, steps: Sequence[Method], sampler: Sampler) -> Batches | None:
    """Calibration batches from whatever was given, else from `spec`, if a step asks for them."""
    config = sampler.model.config
    if given is not None and not _is_named(given):
        return batches_of(given, sampler.tokenizer, config, spec.length, spec.batch_size)
    if _is_named(given):
        spec = DataSpec(**(given if isinstance(given, Mapping) else source(os.fspath(given))))
    if not any(step.needs_data for step in steps):
        return None
    named = next((name for name in EMBEDDED if config._name_or_path in (name, resolve(name))), "")
    return calibration.load(spec.of(named), config, sampler.tokenizer, sampler)


def _is_named(data: Any) -> bool:
    """True for calibration data that a recipe could name too: a word, a path, or its `data` section."""
    return isinstance(data, (str, os.PathLike)) or isinstance(data, Mapping) and bool({"name", "path"} & data.keys())


def _beside(model: nn.Module, steps: Sequence[Method], data: Any) -> Any:
    """The tokenizer in the folder that a model was loaded from, where the data may need one."""
    folder = Path(model.config._name_or_path)
    needed = any(step.needs_data for step in steps) and not isinstance(data, torch.Tensor)
    return load_tokenizer(str(folder)) if needed and folder.is_dir() and model.config._name_or_path else None


def _word(data: Any) -> str | None:
    """Calibration data as a recipe can name it."""
    if data is not None and not isinstance(data, (str, os.PathLike)):
        raise LlmoptError("data: a run that can be repeated reads its data from a file or a data set that has a name; "
                          "llmopt.compress(MODEL, ...) without output takes texts and token ids")
    return _text(data)


def _text(path: Named | None) -> str | None:
    return None if path is None else os.fspath(path)
