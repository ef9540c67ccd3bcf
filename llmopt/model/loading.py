"""Loading the dense model, after a look at its files that turns damage into one clear line."""
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt.errors import LlmoptError, nearest
from llmopt.files.checks import check_config, check_folder, fact_of, read_header, refusals, weight_files
from llmopt.files.hub import check_name, companion
from llmopt.model.finite import check_finite
from llmopt.specs import ModelSpec

REFERENCE = "llmopt/reference"
EXPANSION = 32          # values that one stored number can stand for: int32 words of one-bit weights


def resolve(name: str) -> str:
    """The folder or hub name behind a model id; `llmopt/reference` is the embedded model."""
    if name == REFERENCE:
        from llmopt_evals import world

        return str(world.reference_path())
    return name


def local_folder(spec: ModelSpec) -> Path:
    """Where the files of a model lie, one of the hub after it has been loaded."""
    source = resolve(spec.id)
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
    _check_known(config.model_type, source)
    if getattr(config, "quantization_config", None) is not None:
        raise LlmoptError(f"{source}: the model is already quantized; start from the dense checkpoint")


def load_model(spec: ModelSpec, **placement) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or None) of any causal language model, with the same errors as `load_dense`.

    placement: device_map and what belongs to it, for weights that are to stay in their files.
    """
    source, _ = examine(spec)
    model = _from_pretrained(source, spec, placement)
    tokenizer = fitting_tokenizer(model, source, spec)
    check_finite({name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}, source)
    return model.eval(), tokenizer


def examine(spec: ModelSpec) -> tuple[str, Any]:
    """(folder or hub name, config) of a model, after all that can be checked before a weight is read."""
    check_device(spec.device)
    source, config = read_config(spec)
    if config.get_text_config().max_position_embeddings < 2:
        raise LlmoptError(f"{source}: config.json says that the model reads fewer than 2 tokens")
    if Path(source).is_dir():
        _check_shapes(Path(source), config, spec.trust_remote_code)
    return source, config


def read_config(spec: ModelSpec) -> tuple[str, Any]:
    """(folder or hub name, its config); a folder's files are looked at first."""
    from transformers import AutoConfig

    source = resolve(spec.id)
    if Path(source).is_dir():
        check_folder(Path(source))
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
    from transformers import AutoModelForCausalLM

    with refusals(f"{folder}: the model cannot be loaded"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
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
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:     # the second: "Torch not compiled with CUDA enabled"
        raise LlmoptError(f"device {name!r} cannot be used on this machine: {fact_of(error)}") from error


def _from_pretrained(source: str, spec: ModelSpec, placement: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec.dtype) if spec.dtype else "auto"
    with refusals(f"{source}: the model cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code,
            use_safetensors=True, output_loading_info=True, **placement)
        model = model if placement else model.to(spec.device)
    foreign = [key for key in info["unexpected_keys"] if key.endswith(".weight")]     # old buffers do no harm
    for kind, keys in (("missing", info["missing_keys"]), ("unknown to the config", foreign)):
        if keys:
            raise LlmoptError(f"{source}: {len(keys)} tensors {kind}, such as {min(keys)}; "
                              "the checkpoint does not fit its config")
    return model


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside the model, or None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / f).exists() for f in
                                   ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        return None
    with refusals(f"{source}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)


def fitting_tokenizer(model: nn.Module, source: str, spec: ModelSpec) -> Any:
    """The tokenizer beside the model, or None; raises LlmoptError for one of another model."""
    tokenizer = load_tokenizer(source, spec.revision, spec.trust_remote_code)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise LlmoptError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; "
                          "they belong to different models")
    return tokenizer


def _check_known(kind: Any, source: str) -> None:
    from llmopt.model.architectures import SPECS

    if kind not in SPECS:
        raise LlmoptError(f"{source}: architecture {kind!r} is not supported{nearest(str(kind), SPECS)}")
