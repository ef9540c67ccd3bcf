"""Quantized modules as compressed-tensors holds them (model/packing.py), and their quantization_config.

What is written loads in stock transformers, bit-exact, but for what OURS names: with the exact name of every module as
a target, and one pattern for all experts (model/expert_files.py). What its lazy loading
cannot do (zero points; small floats in a model that is not bfloat16) carries `dequantize: true`, by which
transformers unpacks all weights when it loads them; that takes one setting for all of them.
"""
import re

from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model import expert_files
from llmopt.model.beside_text import layers_alone
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.codes import Quantized
from llmopt.model.expert_files import EXPERTS
from llmopt.model.forms import BYTES
from llmopt.model.packed_loading import NEEDS
from llmopt.model.packing import facts_of, format_of
from llmopt.model.state import tied_names
from llmopt.model.stored import dequantizes, is_table, packed_weights, refuse_unportable
from llmopt.model.weights import Weight, check_consistent, coded

TABLE = "embedding"         # the config group of one that takes `import llmopt` to be loaded
OURS = {TABLE: "an embedding of less than 8 bits", EXPERTS: "experts that dense files keep in one tensor"}
Exported = tuple[dict[str, dict[str, Tensor]], dict]


def export(model: nn.Module) -> Exported | None:
    """({state-dict key: tensors written in its place}, quantization_config); None when nothing is quantized.

    Raises LlmoptError for what compressed-tensors cannot hold, or where codes and dense weights disagree.
    """
    found = coded(model)
    if not found:
        return None
    refuse_unportable(model)
    refuse_unequal(model)
    check_consistent(model)
    return packed_weights(model), quantization_config(model)


def refuse_unequal(model: nn.Module) -> None:
    """Raise LlmoptError where weights that kernels run as one (q k v, gate up) would not be written alike.

    vLLM reads such a set by its first part. Weights of a model that was loaded from a file stay as they were there.
    """
    if any("quantization_scheme" in vars(module) for module in model.modules()):
        return
    known = {weight.name: _setting(weight.codes) for weight in coded(model)}
    for members in (members for block in blocks(model) for members in (block.attn_in, block.ffn_in)):
        first = members[0].name if members else ""
        for other in (p.name for p in members if known.get(p.name) != known.get(first)):
            raise LlmoptError(f"{first} would be written {known.get(first, 'dense')}, {other} "
                              f"{known.get(other, 'dense')}, and kernels run the two as one weight: give both the same "
                              "in overrides and ignore, or use format: dense")


def _setting(codes: Quantized) -> str:
    """What kernels must know of a weight."""
    groups = f"groups of {codes.group_size}" if codes.group_size > 0 else "one scale per channel"
    more = (", zero points" if codes.zeros is not None else "") + (", inputs rounded" if codes.inputs else "")
    return f"at {codes.bits:g} bits ({codes.form.name}, {groups}{more})"


def widths(config: dict) -> dict[str, int]:
    """The bits of every module that a quantization_config of ours names."""
    return {name: group["weights"]["num_bits"] for group in config["config_groups"].values()
            for name in group["targets"]}


def facts(config: dict) -> dict[str, dict]:
    """What model.packing.unpacked wants to know of each module that a quantization_config of ours names."""
    return {name: facts_of(group["weights"], group.get("format"), group["input_activations"])
            for group in config["config_groups"].values() for name in group["targets"]}


def rounded_inputs(config: dict) -> list[str]:
    """How what the weights read is rounded while the model runs, in words; a config of anybody's."""
    groups = config.get("config_groups")
    known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    found = [group.get("input_activations") for group in known]
    told = [f"{given.get('num_bits')} bits, {'range fixed' if given.get('dynamic') is False else 'range by its values'}"
            for given in found if isinstance(given, dict)]
    return list(dict.fromkeys(told))


def quantization_config(model: nn.Module) -> dict:
    """The quantization_config of config.json: one group for each setting, exact names as targets."""
    found, own = coded(model), _ours(model)
    settings: dict[tuple, list] = {}
    for weight in found:
        codes = weight.codes
        key = own.get(weight.key, ""), codes.bits, codes.group_size, codes.form.name, codes.inputs is not None
        settings.setdefault(key, []).append(weight)
    shared = [name.removesuffix(".weight") for name in tied_names(model)]
    named = {key: [name for weight in settings[key] if weight.expert is None
                   for name in (weight.path, *_sharing(weight, shared))] + expert_files.targets(model, settings[key])
             for key in sorted(settings)}
    if alone := layers_alone(model):            # whoever loads that part only finds the same weights by other names
        own = spec_of(model).layers
        named = {key: [*names, *(other for name in names if (other := _moved(name, own, alone)) != name)]
                 for key, names in named.items()}
    known = {name for names in named.values() for name in names}
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in known and n != "lm_head"]
    formats = {format_of(weights[0].codes) for weights in settings.values()}
    return {"quant_method": "compressed-tensors", "format": min(formats) if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", **({"dequantize": True} if dequantizes(model) else {}),
            "ignore": [*(["lm_head"] if "lm_head" not in known else []), *dense],
            "config_groups": {key[0] or f"group_{i}": _scheme(settings[key][0].codes, names, len(formats) > 1) |
                              (NEEDS if key[0] == EXPERTS else {}) for i, (key, names) in enumerate(named.items())}}


def _ours(model: nn.Module) -> dict[str, str]:
    """By the keys of weights with codes that take `import llmopt` to be loaded, the names of their groups."""
    found = coded(model)
    stacks = expert_files.stacked(found)
    return dict.fromkeys((w.key for w in found if is_table(w, model)), TABLE) | dict.fromkeys(
        (key for key, members in stacks.items() if expert_files.kept_whole(model, members[0])), EXPERTS)


def needed(model: nn.Module) -> list[str]:
    """A sentence for what of a model with codes, or of its outline, only llmopt loads when it is packed."""
    return [f"what is written loads after `import llmopt` alone: it holds {OURS[name]}; format: dense loads everywhere"
            for name in dict.fromkeys(_ours(model).values())]


def ours(config: dict) -> list[str]:
    """What takes `import llmopt` to be loaded, by the names of its groups; of a config.json that anybody wrote."""
    packed = config.get("quantization_config")
    groups = packed.get("config_groups") if isinstance(packed, dict) else None
    return [name for name in OURS if isinstance(groups, dict) and name in groups]


def _moved(target: str, before: str, after: str) -> str:
    """A target, the name of a module or a pattern, where the decoder layers are called `after`."""
    escaped = target.startswith("re:")
    first, second = (re.escape(path) if escaped else path for path in (before, after))
    head = "re:" * escaped
    return head + second + target.removeprefix(head + first) if target.startswith(f"{head}{first}") else target


def _sharing(weight: Weight, heads: list[str]) -> list[str]:
    """The heads that a loader makes of the same codes: of an embedding in bytes those tied to it."""
    return heads if weight.codes.form == BYTES and isinstance(weight.module, nn.Embedding) else []


def _scheme(codes: Quantized, names: list[str], mixed: bool) -> dict:
    kind, told = format_of(codes), {}
    if kind != "pack-quantized" or mixed:
        told = {"format": kind}
    return {"targets": names, "input_activations": codes.inputs, "output_activations": None, **told,
            "weights": {"num_bits": codes.bits, "type": "float" if codes.form.is_float else "int",
                        "symmetric": codes.zeros is None, "dynamic": False, **_grouping(codes)}}


def _grouping(codes: Quantized) -> dict:
    form, size = codes.form, codes.group_size
    if form.scales != "model":
        kind, stored = ("tensor_group", "float8_e4m3fn") if form.scales == "e4m3" else ("group", "uint8")
        return {"strategy": kind, "group_size": size, "scale_dtype": f"torch.{stored}"}
    if form.rows != 1:
        return {"strategy": "block", "block_structure": [form.rows, size]} if form.rows else {"strategy": "tensor"}
    return {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
