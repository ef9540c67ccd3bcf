"""Loading the dense model, after a look at its files that turns damage into one clear line."""
import importlib.util
import math
import os
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt.errors import LlmoptError, closest, naming
from llmopt.files.checks import check_config, fact_of, read_header, refusals, weight_files
from llmopt.files.hub import check_name, companion
from llmopt.files.limited import limited
from llmopt.files.packaged import EMBEDDED
from llmopt.files.tensors import file_of, read
from llmopt.model.context import context_length
from llmopt.model.finite import all_finite, cast, check_finite
from llmopt.model.fit import check_types, refuse_foreign
from llmopt.model.ways import dequantized, view
from llmopt.model.ways.write import needs_view, opened
from llmopt.specs import ModelSpec

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")       # one of them is there
DEVICES = ("cpu", "cuda", "cuda:1", "mps", "xpu")
MOST_ADDED = 1000       # tokens that somebody may have added to a tokenizer of this model; more are another's
PAGE = f"{string.printable} The fox runs . {'a' * 60}! {'x' * 60} {'ab ' * 30}\u00e9\u4f60\U0001f600 " * 4
EXPANSION = 32          # values that one stored number can stand for: int32 words of one-bit weights


def resolve(model: str | ModelSpec) -> str:
    """The folder or hub name behind a model, or its id; the embedded ones have names; `~` is the user's home.

    What does not lie there as plain safetensors is opened: the folder is then its view (model/ways/view.py).
    """
    name = os.path.expanduser(model if isinstance(model, str) else model.id)
    if name in EMBEDDED:
        from llmopt_evals import world

        name = str(world.reference_path(name))
    spec = ModelSpec(id=name) if isinstance(model, str) and name else model
    if isinstance(spec, ModelSpec) and needs_view(spec):
        return str(opened(replace(spec, id=name)))
    return name


def local_folder(spec: ModelSpec) -> Path:
    """The folder with a model's files; for a hub model the one in the cache, once it has been loaded."""
    source = resolve(spec)
    return Path(source) if Path(source).is_dir() else companion(source, "config.json", spec.revision).parent


def load_dense(spec: ModelSpec) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or None) for compression: a supported architecture, not yet quantized.

    Raises LlmoptError for anything missing, truncated, unfit or not finite, before the weights are read if it can.
    """
    check_dense(spec)
    return load_model(spec)


def check_dense(spec: ModelSpec) -> None:
    """Raise LlmoptError for a model that cannot be compressed: not supported, or already quantized."""
    source, config = read_config(spec)
    _check_known(config, source, spec.trust_remote_code)
    if method := dequantized.method_of(config.to_dict()):
        raise LlmoptError(f"{source}: the model is already quantized by {method}; {dequantized.advice(method)}")


def load_model(spec: ModelSpec, **placement) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or None) of any causal language model, with the same errors as `load_dense`.

    placement: device_map and what belongs to it, for weights that are to stay in their files.
    """
    source, config = examine(spec)
    model = _from_view(spec.at(source)) if view.of(source) else _from_pretrained(source, config, spec, placement)
    if not Path(source).is_dir():
        check_types(local_folder(spec), config)
    tokenizer = fitting_tokenizer(model, source, spec)
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not all_finite(tensor):
            _blame_overflow(local_folder(spec), tensor.dtype)
            check_finite({name: tensor}, source)
    return model.eval(), tokenizer


def _blame_overflow(folder: Path, dtype: torch.dtype) -> None:
    """Raise LlmoptError if the files hold good values that `dtype` cannot hold."""
    for name, place in view.places(folder).items():
        for tensor in read({name: place}).values():
            cast(tensor, dtype, f"{file_of(place)}: {name}")


def examine(spec: ModelSpec) -> tuple[str, Any]:
    """(folder or hub name, config) of a model, after all that can be checked before a weight is read."""
    check_device(spec.device)
    source, config = read_config(spec)
    if context_length(config) < 2:
        raise LlmoptError(f"{source}: config.json says that the model reads fewer than 2 tokens")
    if Path(source).is_dir() and view.of(source) is None:
        check_types(Path(source), config)
        _check_shapes(Path(source), config, spec.trust_remote_code)
    return source, config


def read_config(spec: ModelSpec) -> tuple[str, Any]:
    """(folder or hub name, its config); a folder's files are looked at first."""
    from transformers import AutoConfig

    source = resolve(spec)
    if Path(source).is_dir():
        view.check(Path(source))
    elif Path(source).exists() or source.startswith((".", "/", "~")):
        raise LlmoptError(f"{source}: not a model folder")
    else:
        check_name(source, spec.revision)
        file = companion(source, "config.json", spec.revision)
        if file:
            check_config(file)
    with refusals(f"{source}: the model cannot be loaded"):
        return source, AutoConfig.from_pretrained(source, revision=spec.revision or "main",
                                                  trust_remote_code=spec.trust_remote_code)


def _check_shapes(folder: Path, config: Any, trust: bool) -> None:
    """Raise LlmoptError for a tensor, or a total, that the config does not want, before memory is taken for it."""
    from llmopt.model.auto import auto_class

    with refusals(f"{folder}: the model cannot be loaded"), torch.device("meta"):
        skeleton = auto_class(config).from_config(config, trust_remote_code=trust)
    wanted, stored = skeleton.state_dict(), 0
    for file in weight_files(folder):
        for name, entry in read_header(file)[0].items():
            stored += math.prod(entry["shape"])
            if name in wanted and entry["shape"] != list(wanted[name].shape):
                raise LlmoptError(f"{file}: {name} is {entry['shape']}, the config wants {list(wanted[name].shape)}; "
                                  "the checkpoint does not fit its config")
    needed = sum(tensor.numel() for tensor in wanted.values())
    if needed > EXPANSION * stored:
        raise LlmoptError(f"{folder}: config.json wants {needed:,} values, the weight files hold {stored:,}; "
                          "the checkpoint does not fit its config")


def check_device(name: str) -> None:
    """Raise LlmoptError unless tensors can live on the device `name` of this machine."""
    try:
        torch.device(name)
    except RuntimeError as error:                       # which lists all kinds that there ever were
        hint = " (did you mean 'cuda'?)" if name.startswith("gpu") else closest(name, DEVICES)
        raise LlmoptError(f"device {name!r} is not known{hint}; such as {', '.join(DEVICES)}") from error
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:     # the second: "Torch not compiled with CUDA enabled"
        raise LlmoptError(f"device {name!r} cannot be used on this machine: {fact_of(error)}") from error


def _from_view(spec: ModelSpec) -> nn.Module:
    from llmopt.model.ways.whole import filled

    return filled(spec)


def _from_pretrained(source: str, config: Any, spec: ModelSpec, placement: dict[str, Any]) -> nn.Module:
    from llmopt.model.auto import auto_class

    dtype = getattr(torch, spec.dtype) if spec.dtype else "auto"
    with refusals(f"{source}: the model cannot be loaded"):
        model, info = auto_class(config).from_pretrained(
            source, dtype=dtype, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code,
            use_safetensors=True, output_loading_info=True, **placement)
        model = model if placement else model.to(spec.device)
    if missing := info["missing_keys"]:
        raise LlmoptError(f"{source}: {len(missing)} tensors missing, such as {min(missing)}; "
                          "the checkpoint does not fit its config")
    refuse_foreign(info["unexpected_keys"], source)
    return model


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside the model, or None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if not any(companion(source, name, revision) for name in TOKENIZER):
        return None
    if folder.is_dir() and (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        _need_sentencepiece(source)
    with refusals(f"{source}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main",
                                                  trust_remote_code=trust_remote_code)
    _try_out(tokenizer, source)
    return tokenizer


def _try_out(tokenizer: Any, source: str) -> None:
    """Raise LlmoptError for a tokenizer that breaks down over a page of text, and for odd names of chat templates."""
    names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ()
    for name in names:                  # each becomes a file of the output
        if not re.fullmatch(r"[\w-][\w.-]*", str(name)):
            raise LlmoptError(f"{source}: a chat template is named {str(name)[:80]!r}, which is no plain name")
    count = limited(lambda: len(tokenizer(PAGE)["input_ids"]), f"{source}: the tokenizer cannot be used", len(PAGE))
    if count > 20 * len(PAGE):
        raise LlmoptError(f"{source}: the tokenizer makes {count:,} tokens of {len(PAGE):,} characters")


def is_installed(module: str) -> bool:
    """True if a module can be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:             # of its parent
        return False


def _need_sentencepiece(source: str) -> None:
    """Raise LlmoptError where the packages that read a tokenizer.model are missing; transformers blames tiktoken."""
    wanted = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [name for name, module in wanted.items() if not is_installed(module)]
    if missing:
        raise LlmoptError(f"{source}: tokenizer.model is a SentencePiece file, and without a tokenizer.json it takes "
                          f"the package {' and '.join(missing)} to read it: pip install {' '.join(missing)}")


def fitting_tokenizer(model: nn.Module, source: str, spec: ModelSpec) -> Any:
    """The tokenizer beside the model, or None; raises LlmoptError for one of another model."""
    tokenizer = load_tokenizer(source, spec.revision, spec.trust_remote_code)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is None or len(tokenizer) <= rows:
        return tokenizer
    fact = f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows"
    late = sorted(index for index in tokenizer.added_tokens_decoder if index >= rows)
    if len(late) < len(tokenizer) - rows or len(late) > MOST_ADDED:
        raise LlmoptError(f"{fact}; they belong to different models")
    raise LlmoptError(f"{fact}: {', '.join(repr(str(tokenizer.added_tokens_decoder[i])) for i in late[:3])} "
                      "was added to the tokenizer alone; take it out again, or give the model a row for it "
                      "(model.resize_token_embeddings(len(tokenizer)))")


def _check_known(config: Any, source: str, trust: bool) -> None:
    """Raise LlmoptError for a model whose layers are neither in the table nor to be found."""
    from llmopt.model.architectures import REFUSED, SPECS, unsupported
    from llmopt.model.auto import auto_class
    from llmopt.model.blocks import spec_of
    from llmopt.model.skeleton import skeleton

    kind = config.model_type
    own = getattr(config, "auto_map", None) or {}
    ours = type(config) in auto_class(config)._model_mapping or "AutoModelForCausalLM" in own
    if kind in REFUSED or not ours:
        raise LlmoptError(f"{source}: {unsupported(kind)}")
    if kind not in SPECS:
        with naming(source), refusals("the model cannot be loaded"):
            spec_of(skeleton(config, torch.float32, trust))
