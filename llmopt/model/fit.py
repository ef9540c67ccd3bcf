"""The tensors of a model's files held against its config, by name and type: none is dropped or cast in silence."""
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import read_header, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")
# buffers that older versions of transformers wrote, and that are computed from the config; runtime tensors of llmopt
LEFTOVERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias"
                       r"|position_ids)$|^llmopt\.")


def refuse_foreign(names: Iterable[str], source: str) -> None:
    """Raise LlmoptError for tensors that the config has no place for; buffers of old versions do no harm."""
    if foreign := sorted(name for name in names if not LEFTOVERS.search(name)):
        raise LlmoptError(f"{source}: {len(foreign)} tensors unknown to the config, such as {foreign[0]}; "
                          f"the checkpoint does not fit its config{_reason(foreign[0])}")


def _reason(name: str) -> str:
    """The likely reason for a tensor without a place, where its name tells."""
    if "lora_" in name:
        return ": merge the adapter into its model first (--adapter FOLDER, or peft's merge_and_unload)"
    if re.search(r"(scale|scale_inv|zero_point|absmax|qweight|qzeros|g_idx)$", name):
        return ": the weights are quantized; start from the dense checkpoint"
    return ": a bias that a flag of config.json switches off?" if name.endswith(".bias") else ""


def check_types(folder: Path, config: Any) -> None:
    """Raise LlmoptError for weights that are no floating-point numbers, which loading would cast in silence.

    A quantized checkpoint says in its config what its integers mean.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    for file in weight_files(folder):
        for name, entry in read_header(file)[0].items():
            if entry["dtype"] not in FLOATS and not LEFTOVERS.search(name):
                raise LlmoptError(f"{file}: {name} holds {entry['dtype']}, and config.json has no quantization_config "
                                  f"that says what they mean; weights must be one of {', '.join(FLOATS)}")
