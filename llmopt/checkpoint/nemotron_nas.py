"""Checkpoints for servers: per-layer shapes as NVIDIA's Nemotron-NAS models state them, which vLLM and SGLang read.

    config.block_configs[i] = {attention: {no_op, n_heads_in_group}, ffn: {no_op, ffn_mult | intermediate_size}}

Such a server gives all layers num_attention_heads query heads on num_attention_heads / n_heads_in_group KV heads. A
layer with fewer query heads is filled up with heads whose weights are zero, which change nothing and leave its cache as
small as the count of its KV heads allows. ffn_mult stands for widths that are multiples of 256, by

    width = 2/3 ffn_mult hidden_size, rounded up to a multiple of 256

vLLM alone reads any other width, as intermediate_size. Layers must be Llama's but for biases of q, k and v (Qwen2).
"""
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.checkpoint.place import prepare_output, staged
from llmopt.errors import LlmoptError
from llmopt.files import own, shards, tensors
from llmopt.files.checks import load_json
from llmopt.model.architectures import SPECS, unsupported
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.loading import read_config
from llmopt.model.positions import attention_windows
from llmopt.model.shapes import LayerShape, shapes
from llmopt.model.skeleton import skeleton
from llmopt.specs import ModelSpec

ROUND = 256                     # to multiples of this ffn_mult is rounded
CODE = "configuration_nemotron_nas.py"
GONE = ("per_layer_config", "allow_global_per_layer_attribute_access", "llmopt", "auto_map", "num_key_value_heads",
        "layer_types", "use_sliding_window", "max_window_layers", "sliding_window")
CLASS = '''"""The config of a model whose layers differ, with the blocks as objects: servers read their fields."""
from types import SimpleNamespace

from transformers import PretrainedConfig


class NemotronNASConfig(PretrainedConfig):
    """block_configs: for each layer {"attention": {...}, "ffn": {...}}."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        self.block_configs = [SimpleNamespace(**{part: SimpleNamespace(**fields) for part, fields in block.items()})
                              for block in block_configs or []]
        super().__init__(**kwargs)

    def to_dict(self):
        found = super().to_dict()
        found["block_configs"] = [{part: vars(fields) for part, fields in vars(block).items()}
                                  for block in self.block_configs]
        return found
'''


def export(folder: Path, output: Path, max_shard_size: str = "5GB") -> dict[str, Any]:
    """Write the checkpoint of a folder anew, for servers; what was written, for people.

    Raises LlmoptError for architectures and shapes that no such server runs, and an output in use.
    """
    spec = ModelSpec(id=str(folder))
    source, config = read_config(spec)
    folder, output = Path(source), prepare_output(output, source, overwrite=False)
    if config.model_type not in SPECS:
        raise LlmoptError(unsupported(config.model_type))
    model = skeleton(config, torch.bfloat16)
    _check_layout(model)
    layers, dim = shapes(model), next(block.head_dim for block in blocks(model) if block.attention is not None)
    _check_start(layers)
    heads = max(layer.heads for layer in layers)
    given = load_json(folder / "config.json")
    filled = [index for index, layer in enumerate(layers) if 0 < layer.heads < heads]
    if filled and "quantization_config" in given:
        raise LlmoptError(f"{folder}: layer {filled[0]} has {layers[filled[0]].heads} query heads of {heads}, and "
                          "packed weights cannot be filled up with zeros; export before quantization, or prune with "
                          "units that leave all query heads (ffn, attention, mlp, blocks)")
    found = {name: place for name, place in tensors.places(folder).items() if not name.startswith("llmopt.")}
    with staged(output) as stage:
        writer = shards.Writer(stage, max_shard_size)
        for group in shards.by_block(found):
            writer.add({name: fill(name, tensor, layers, heads, dim) for name, tensor in tensors.read(group).items()})
        writer.close()
        biased = {name.split(".")[-2] for name in found if ".self_attn." in name and name.endswith(".bias")}
        described = described_config(given, layers, heads, dim, biased="q_proj" in biased and "o_proj" not in biased)
        (stage / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        (stage / CODE).write_text(CLASS)
        _carry_over(folder, stage)
    return {"folder": str(output), "layers": len(layers), "bytes": shards.written_bytes(output),
            "filled_layers": filled,
            "left_out": [next(iter(step["method"])) for step in (given.get("llmopt") or {}).get("steps", [])],
            "widths_for_all": all("intermediate_size" not in block["ffn"] for block in described["block_configs"])}


def described_config(given: dict[str, Any], layers: list[LayerShape], heads: int, dim: int,
                     biased: bool) -> dict[str, Any]:
    """The config.json of the export; given: that of the checkpoint. biased: q, k and v have biases, o has none."""
    told = {key: value for key, value in given.items() if key not in GONE}
    told |= {"intermediate_size": max(layer.width for layer in layers), "num_attention_heads": heads, "head_dim": dim}
    return told | {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.NemotronNASConfig"},
        **({"qkv_bias": True, "attention_bias": False} if biased else {}),
        "block_configs": [block_config(layer, heads, given["hidden_size"]) for layer in layers]}


def block_config(layer: LayerShape, heads: int, hidden_size: int) -> dict[str, dict[str, Any]]:
    """What a server is told of one layer."""
    attends, thinks = "attention" not in layer.skip, "mlp" not in layer.skip
    attention = {"no_op": not attends, "replace_with_linear": False,
                 "n_heads_in_group": heads // groups_of(layer, heads) if attends else None}
    ffn: dict[str, Any] = {"no_op": not thinks, "replace_with_linear": False}
    if not thinks or layer.width % ROUND == 0:
        return {"attention": attention, "ffn": ffn | {"ffn_mult": _multiplier(layer.width, hidden_size) if thinks
                                                      else None}}
    return {"attention": attention, "ffn": ffn | {"intermediate_size": layer.width}}


def _multiplier(width: int, hidden_size: int) -> float:
    """The number that a server turns into `width`: half a channel less, so that no rounding carries it above."""
    return 1.5 * (width - 0.5) / hidden_size


def groups_of(layer: LayerShape, heads: int) -> int:
    """KV heads of a layer with `heads` query heads: the fewest that divide them and hold every group of the layer."""
    size = layer.heads // layer.kv_heads
    return next(n for n in range(layer.kv_heads, heads + 1) if heads % n == 0 and heads // n >= size)


def fill(name: str, tensor: Tensor, layers: list[LayerShape], heads: int, dim: int) -> Tensor:
    """A tensor of attention with zeros in the places of heads that its layer lacks; any other as it is."""
    parts = name.split(".")
    projection = parts[-2] if len(parts) > 1 else ""
    if "self_attn" not in parts or projection not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return tensor
    layer = layers[int(parts[parts.index("self_attn") - 1])]
    if layer.heads == heads:
        return tensor
    places = _places(layer, heads, dim, keys=projection in ("k_proj", "v_proj"))
    total = (groups_of(layer, heads) if projection in ("k_proj", "v_proj") else heads) * dim
    if projection == "o_proj":
        return tensor if parts[-1] == "bias" else tensor.new_zeros(len(tensor), total).index_copy_(1, places, tensor)
    return tensor.new_zeros(total, *tensor.shape[1:]).index_copy_(0, places, tensor)


def _places(layer: LayerShape, heads: int, dim: int, keys: bool) -> Tensor:
    """Where the channels of a layer's heads (keys: of its KV heads) come to stand among those of `heads`."""
    if keys:
        return torch.arange(layer.kv_heads * dim)
    slots, size = heads // groups_of(layer, heads), layer.heads // layer.kv_heads
    first = torch.arange(layer.kv_heads)[:, None] * slots + torch.arange(size)                     # [G, H/G]
    return (first.flatten()[:, None] * dim + torch.arange(dim)).flatten()


def _check_layout(model: nn.Module) -> None:
    """Raise LlmoptError unless the layers compute as Llama's do."""
    if not spec_of(model).served:
        known = ", ".join(name for name, spec in SPECS.items() if spec.served)
        raise LlmoptError(f"{model.config.model_type}: servers know per-layer shapes of Llama's layout alone ({known})")
    if any(window is not None for window in attention_windows(model)):
        raise LlmoptError(f"{model.config.model_type}: has sliding windows, which a server would leave out")


def _check_start(layers: list[LayerShape]) -> None:
    """Raise LlmoptError for a model that begins with an FFN: vLLM begins a residual stream with attention."""
    first = next((index for index, layer in enumerate(layers) if len(layer.skip) < 2), 0)
    if "attention" in layers[first].skip:
        raise LlmoptError(f"layer {first} has lost its attention and stands first; vLLM's reader begins with "
                          "attention: keep that of the first layer")


def _carry_over(folder: Path, stage: Path) -> None:
    """The tokenizer, generation config and licences."""
    for file in sorted(folder.iterdir()):
        if file.name in (*own.LICENCES, "generation_config.json") or own.TOKENIZERS.fullmatch(file.name):
            shutil.copyfile(file, stage / file.name)
