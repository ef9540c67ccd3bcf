"""From the shapes of the layers to a config that describes them, or a reason why none can."""
import copy
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llmopt.errors import LlmoptError
from llmopt.model import places
from llmopt.model.blocks import Block, blocks, refuse_units, spec_of
from llmopt.model.modeling import FAMILIES, heads_fit, write_layers

NOT_BY_LAYER = ("token_id", "architectures")        # keys with lists that may happen to be as long


class LayerShape(NamedTuple):
    """The shape of a layer as a config can give it: H, G, F, and the parts that are gone."""

    heads: int
    kv_heads: int
    width: int
    skip: tuple[str, ...] = ()


def shape_of(block: Block, has_ffn: bool = True) -> LayerShape:
    """The present shape of a block; has_ffn: False for Mixture-of-Experts, whose FFN is not seen as one.

    No figure of parts that no table tells apart.
    """
    if block.read is not None:
        return LayerShape(*((block.heads, block.kv_heads) if block.heads_known else (0, 0)), block.width)
    skip = ("attention",) * (block.attention is None) + ("mlp",) * (has_ffn and block.ffn_out is None)
    return LayerShape(block.heads, block.kv_heads, block.width, skip)


def shapes(model: nn.Module) -> list[LayerShape]:
    """The present shape of every layer."""
    has_ffn = bool(spec_of(model).ffn_out)
    return [shape_of(block, has_ffn) for block in blocks(model)]


def uniform(layers: list[LayerShape]) -> bool:
    """True if one plain config describes all layers; of a hybrid some have no heads."""
    return (len({layer.width for layer in layers}) == 1 and len(head_counts(layers)) <= 1
            and not any(layer.skip for layer in layers))


def head_counts(layers: list[LayerShape]) -> set[tuple[int, int]]:
    """The pairs (H, G) that occur; none where heads are not told apart."""
    return {(layer.heads, layer.kv_heads) for layer in layers if layer.heads}


def check_storable(model: nn.Module, layers: list[LayerShape]) -> None:
    """Raise LlmoptError if no config of this architecture can describe `layers`."""
    by_type = spec_of(model).groups_by_type
    if not uniform([layer._replace(heads=0) for layer in layers] if by_type else layers):
        refuse_units(model, "per_layer_shapes")
    counts, config = head_counts(layers), model.config.get_text_config()
    if not counts:
        return
    if by_type:
        _check_types(config, layers)
        return
    if len(counts) > 1 or not heads_fit(config, next(iter(counts))[0]):
        refuse_units(model, "per_layer_heads")
    else:
        _check_heads(config, *next(iter(counts)))


def _check_types(config, layers: list[LayerShape]) -> None:
    """Raise LlmoptError unless all layers have as many query heads, and those of a type as many KV heads."""
    held = {(kind, layer.kv_heads) for kind, layer in zip(config.layer_types, layers, strict=False)}
    heads = sorted({layer.heads for layer in layers})
    if len(heads) > 1 or len(held) > len({kind for kind, _ in held}):
        left = ", ".join(f"{kind} {count}" for kind, count in sorted(held))
        raise LlmoptError(f"{config.model_type}: its config has one number of query heads for all layers, of KV heads "
                          f"for all of a type; left would be {' or '.join(map(str, heads))} query heads, and of KV "
                          f"heads {left}; another ratio may fit, such as one half")


def _check_heads(config, heads: int, kv_heads: int) -> None:
    """Raise LlmoptError where the config's own checks refuse these counts, as Phi-3's do with longrope."""
    trial = copy.deepcopy(config)
    trial.per_layer_config = None
    trial.num_attention_heads, trial.num_key_value_heads = heads, kv_heads
    try:
        trial.validate()
    except StrictDataclassError as error:
        raise LlmoptError(f"{config.model_type}: its config refuses {heads} query heads: {error.__cause__}") from error


def check_droppable(model: nn.Module, kept: list[int] | None = None) -> None:
    """Raise LlmoptError if a layer of this model depends on its place among the others.

    kept: the layers that will stay; without them it is not looked at whether those of an unknown model would do.
    """
    config = model.config.get_text_config().to_dict()
    seen = len(model.config.to_dict().get("vision_config", {}).get("deepstack_visual_indexes", None) or ())
    if kept is not None and kept[:seen] != list(range(seen)):
        raise LlmoptError(f"{model.config.model_type}: blocks cannot be pruned: the first {seen} take in what the "
                          "model sees, each its own part of it, and must all stay")
    if not spec_of(model).known and kept is not None:
        places.check(model, kept, sliced(model.config, kept))
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise LlmoptError(f"{config['model_type']}: blocks cannot be pruned: attention is scaled by the layer's number")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise LlmoptError(f"{config['model_type']}: blocks cannot be pruned: experts are placed by the layer's number")


def slice_config(model: nn.Module, kept: list[int]) -> None:
    """Let the lists with one entry per layer follow the layers that remain."""
    if spec_of(model).known:
        model.config.per_layer_config = None
    _slice(model.config, kept)


def sliced(config: Any, kept: list[int]) -> Any:
    """A config of the layers that remain."""
    made = copy.deepcopy(config)
    _slice(made, kept)
    return made


def _slice(config: Any, kept: list[int]) -> None:
    config = config.get_text_config()
    count = config.num_hidden_layers
    for key, entries in config.to_dict().items():
        if isinstance(entries, list) and len(entries) == count and not key.endswith(NOT_BY_LAYER):
            setattr(config, key, [entries[i] for i in kept])
    if config.num_hidden_layers == count:               # some count their layers by such a list
        config.num_hidden_layers = len(kept)


def sync_config(model: nn.Module) -> None:
    """Make `model.config` describe the model's present shapes; raises LlmoptError where it cannot."""
    layers, config, spec = shapes(model), model.config.get_text_config(), spec_of(model)
    counts = head_counts(layers)
    if not spec.reshapes:                               # whose layers stay as they are, or leave
        return
    check_storable(model, layers)
    if not spec.known and "per_layer_shapes" in spec.refuse:
        if layers[0].width:
            config.intermediate_size = layers[0].width
        if spec.groups_by_type and counts:
            _write_types(model)
            return
        for heads, kv_heads in counts:
            _write_heads(model, heads, kv_heads)
        return
    config.per_layer_config = None
    config.allow_global_per_layer_attribute_access = False
    together = not counts or len(counts) == 1 and (uniform(layers) or heads_fit(config, next(iter(counts))[0]))
    if together and counts:
        _write_heads(model, *next(iter(counts)))
    if uniform(layers):
        if layers[0].width:
            setattr(config, FAMILIES[config.model_type].width, layers[0].width)
        return
    if not together:
        config.head_dim = _head_dim(model)
    write_layers(config, [_entry(layer, FAMILIES[config.model_type].width, layers, together) for layer in layers])


def _write_heads(model: nn.Module, heads: int, kv_heads: int) -> None:
    config = model.config.get_text_config()
    known = config.to_dict()        # GPT-2 and the like keep their heads under other names, and keep them all
    if (known.get("num_attention_heads", heads), known.get("num_key_value_heads", kv_heads)) == (heads, kv_heads):
        return
    config.head_dim = _head_dim(model)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads


def _write_types(model: nn.Module) -> None:
    """As many query heads in all layers; KV heads by the types of layers that are there, the others' as they were."""
    config, views = model.config.get_text_config(), blocks(model)
    found = {block.attention.layer_type: block for block in views}
    own = {int(index): entry for index, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    given = [config.per_layer_config[index].num_key_value_heads for index in range(config.num_hidden_layers)]
    config.per_layer_config = None
    config.num_attention_heads, config.num_key_value_heads = views[0].heads, views[0].kv_heads
    config.per_layer_config = {index: own.get(index, {}) | {
        "num_key_value_heads": found[kind].kv_heads if kind in found else given[index]}
        for index, kind in enumerate(config.layer_types)}


def _head_dim(model: nn.Module) -> int:
    return next(block.head_dim for block in blocks(model) if block.attention is not None)


def _entry(layer: LayerShape, width: str, layers: list[LayerShape], together: bool) -> dict:
    entry: dict = {width: layer.width or max(other.width for other in layers)}
    if not together and layer.heads:
        entry |= {"num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads}
    return entry | ({"skip": list(layer.skip)} if layer.skip else {})
