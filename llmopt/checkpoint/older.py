"""What transformers 4 and readers of its names look for in a checkpoint: rotary settings, tokenizer class."""
import json
from pathlib import Path
from typing import Any

from llmopt.files.checks import read_json
from llmopt.model.architectures import SPECS, Spec

NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
OF_THIS_RUN = ("backend", "is_local", "local_files_only")       # what transformers 5 notes about how it loaded
ELSEWHERE = ("auto_map", "chat_template", "name_or_path", "processor_class", "special_tokens_map_file",
             "tokenizer_class", "tokenizer_file", *OF_THIS_RUN)


def with_rotary_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its rotary settings under the names of transformers 4 too, where these can say them.

    transformers 5 lets the old names win, so they are written only if it reads the same settings out of both.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parameters = config.get("rope_parameters")
    spec = SPECS.get(config["model_type"])
    if not parameters or spec is None:
        return config
    both = config | _rotary_names(spec, parameters)
    kind = CONFIG_MAPPING[config["model_type"]]             # whose own reader undoes how infinity is written
    read = [kind.from_dict(kind._decode_special_floats(c)).rope_parameters for c in (config, both)]
    return both if read[0] == read[1] else config


def _rotary_names(spec: Spec, parameters: dict[str, Any]) -> dict[str, Any]:
    """{name of transformers 4: value} of flat settings, or of Gemma-3's two; nothing for what it cannot say."""
    local = parameters.get("sliding_attention")
    if local:
        if local.get("rope_type", "default") != "default":
            return {}
        return _rotary_names(spec, parameters["full_attention"]) | {"rope_local_base_freq": local["rope_theta"]}
    names = {spec.old_theta: parameters["rope_theta"]}
    share = parameters.get("partial_rotary_factor")
    if share is not None and spec.old_share:
        names[spec.old_share] = share
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default":
        return names
    if spec.old_scaling:        # which wants the kind of scaling under another name, and the old length beside it
        names["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
        scaling = {"type": scaling["rope_type"], **{k: scaling.get(k) for k in spec.old_scaling}}
    return names | {"rope_scaling": scaling}


def keep_tokenizer_class(stage: Path, source: Path | None) -> None:
    """Give the written tokenizer_config.json the class, and the plain settings, of the one that it was read from.

    transformers 5 writes a class that 4 does not have. source: the model's own tokenizer_config.json, where known.
    """
    file = stage / "tokenizer_config.json"
    if not file.is_file():
        return
    written = {k: v for k, v in read_json(file).items() if k not in OF_THIS_RUN}
    before = read_json(source) if source is not None else {}
    name = before.get("tokenizer_class") or written.get("tokenizer_class")
    written["tokenizer_class"] = OLD_CLASS if name in (None, NEW_CLASS) else name
    written |= {k: v for k, v in before.items() if k not in (*written, *ELSEWHERE)
                and isinstance(v, (bool, int, float, str, type(None)))}
    file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
