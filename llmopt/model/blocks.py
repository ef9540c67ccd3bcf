"""Models of every supported architecture in one view: blocks, projections, norms, geometry.

Notation: B batch, H query heads, G KV heads, T tokens, D head_dim, F FFN channels, E hidden size, L layers.
"""
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llmopt.errors import LlmoptError
from llmopt.model import discovery
from llmopt.model.architectures import NORMS_KEPT, REFUSED, SPECS, UNITS, UNTURNED, Form, Spec, found, unsupported
from llmopt.model.expert_weights import matrices, seen_dense
from llmopt.model.links import Link, Norm, Rows
from llmopt.model.modeling import is_skipped
from llmopt.model.weights import Projection


def spec_of(model: nn.Module) -> Spec:
    """The architecture's table entry, or one that says where its layers are and no more.

    Raises LlmoptError for a model whose layers cannot be told apart or run one by one, and for those of REFUSED.
    """
    kind = model.config.model_type
    if kind in REFUSED:
        raise LlmoptError(unsupported(kind))
    known = SPECS.get(kind)
    if known is None or any(bool(getattr(model.config, flag.removeprefix("not "), False)) != flag.startswith("not ")
                            for flag in known.unless):
        return _found(model)
    return known


def _found(model: nn.Module) -> Spec:
    kind = model.config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model.config.is_encoder_decoder:
        raise LlmoptError(f"architecture {kind!r} is not supported: it has an encoder, whose tokens see later ones")
    first, *others = inspect.signature(model.forward).parameters.values()
    if asked := [first.name] * (first.name != "input_ids") or [p.name for p in others if p.default is p.empty
                                                              and p.kind == p.POSITIONAL_OR_KEYWORD]:
        raise LlmoptError(f"architecture {kind!r} is not supported: it does not read tokens alone ({asked[0]})")
    path = discovery.layers_path(model)
    layers = discovery.found_of(model, path)
    for layer, module in zip(layers, model.get_submodule(path), strict=True):
        layer.left = seen_dense(module, layer.left)
    for index, layer in enumerate(layers):
        if layer.earlier:
            raise LlmoptError(f"architecture {kind!r} is not supported: {path}.{index} is given what earlier layers "
                              f"made beside the hidden state ({', '.join(layer.earlier)})")
    rotary = discovery.rotary_path(model, path)
    kind = model.config.get_text_config().model_type
    at_once = any(layer.at_once for layer in layers)
    return found(kind, all(map(_has_ffn, layers)), kind == model.config.model_type, layers=path, rotary=rotary,
                 entries=layers[0].entries, at_once=at_once, note=discovery.note_of(layers))


def _has_ffn(layer: discovery.Found) -> bool:
    """True if the maps of an entry's feed-forward part by default are among those that run."""
    return {*Spec.ffn_in, Spec.ffn_out} <= {name for group in layer.groups for name in group}


def refuse_units(model: nn.Module, unit: str) -> None:
    """Raise LlmoptError if this architecture cannot lose `unit` (of UNITS), or store per_layer_shapes or _heads."""
    spec = spec_of(model)
    refused = spec.refuse
    if unit in refused:
        verb, left = "pruned", ", ".join(u for u in UNITS if u not in refused)
        if unit not in UNITS:
            verb, left = "stored", "scope: local, which keeps the layers alike" if spec.known else (
                "scope: local and one kind of units, which keep the layers alike")
        raise LlmoptError(f"{model.config.model_type}: {unit} cannot be {verb}: {refused[unit]}. Possible: {left}")


def refuse_folding(model: nn.Module) -> None:
    """Raise LlmoptError if no norm of this model stands in front of its readers."""
    reason = NORMS_KEPT.get(blocks(model)[0].form)
    if reason:
        raise LlmoptError(f"{model.config.model_type}: norms cannot be folded: {reason}")


def refuse_turning(model: nn.Module) -> None:
    """Raise LlmoptError if the residual stream of this model cannot be rotated."""
    reason = UNTURNED.get(blocks(model)[0].form, spec_of(model).refuse.get("ffn"))
    if reason:
        raise LlmoptError(f"{model.config.model_type}: its residual stream cannot be rotated: {reason}. "
                          "stream: false rotates the value heads alone")


@dataclass
class Block:
    """One decoder layer by its functions. Skipped or unsupported parts are None / empty lists.

    read: of a layer that no table describes, what was found to read one input together; its parts are not told apart,
    but for the feed-forward part and the heads where these have an entry.
    beside: the same of what a layer of the table has beside the experts that are chosen, or in their place: shared
    experts, and the feed-forward of a dense layer among sparse ones. No part of these leaves.
    """

    index: int
    name: str
    module: nn.Module
    attention: nn.Module | None
    heads: int                       # H
    kv_heads: int                    # G
    head_dim: int                    # D
    width: int                       # F
    attn_in: list[Projection]        # readers of the residual stream: q, k, v (or one fused)
    attn_out: Projection | None      # writer
    ffn_in: list[Projection]         # readers: gate, up (or one fused; or one up)
    ffn_out: Projection | None       # writer
    norms: dict[str, Norm]
    form: Form
    read: list[list[Projection]] | None = None
    beside: list[list[Projection]] = field(default_factory=list)

    def groups(self) -> list[list[Projection]]:
        """Projections that read the same input together, in the order of the data flow."""
        if self.read is not None:
            return self.read
        readers = [self.behind["both_in"], []] if "both_in" in self.norms else [self.attn_in, self.ffn_in]
        writers = [[writer] if writer else [] for writer in (self.attn_out, self.ffn_out)]
        return [group for pair in zip(readers, writers, strict=True) for group in pair if group] + self.beside

    @property
    def behind(self) -> dict[str, list[Projection]]:
        """By the role of a norm, what reads it."""
        return {"attn_in": self.attn_in, "ffn_in": self.ffn_in, "both_in": [*self.attn_in, *self.ffn_in]}

    @property
    def heads_known(self) -> bool:
        """True if it is known which rows belong to which head."""
        return any("q" in reader.parts for reader in self.attn_in)

    def projections(self) -> list[Projection]:
        return [p for group in self.groups() for p in group]

    def of_experts(self) -> list[Projection]:
        """The matrices of the experts, expert by expert in the order of the data flow; quantization alone sees them."""
        return matrices(self.module, self.name)

    def weights(self) -> list[list[Projection]]:
        """All that can be quantized: the groups, and each matrix of an expert by itself."""
        return [*self.groups(), *([p] for p in self.of_experts())]

    def part(self, which: str) -> tuple[Projection, Tensor]:
        """The projection that computes `which` (q, k, v, gate, up) and its rows [units, rows per unit]."""
        for projection in self.attn_in + self.ffn_in:
            if which in projection.parts:
                return projection, projection.parts[which]
        raise KeyError(which)

    def links(self) -> list[Link]:
        """The links of this block: norm to readers, rows of v to the writer's columns, rows of up to the FFN writer's.

        An FFN without a gate has a nonlinearity there, and no link.
        """
        if self.read is not None:
            return []
        found = [] if self.form in NORMS_KEPT else [Link(self.norms[role], readers)
                                                    for role, readers in self.behind.items()
                                                    if readers and role in self.norms]
        if self.attention is not None:
            projection, rows = self.part("v")
            group = torch.arange(self.heads) // (self.heads // self.kv_heads)          # [H]: whose values a head reads
            columns = group[:, None] * self.head_dim + torch.arange(self.head_dim)     # [H, D]
            found.append(Link(Rows(projection, rows.flatten()), [self.attn_out], columns.flatten()))
        if any("gate" in reader.parts for reader in self.ffn_in):
            projection, rows = self.part("up")
            found.append(Link(Rows(projection, rows.flatten()), [self.ffn_out]))
        return found


def at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the table, which begins at a causal LM; a model without that head holds it as well."""
    return model.base_model.get_submodule(path.removeprefix(f"{model.base_model_prefix}."))


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    return at(model, spec_of(model).layers)


def windows_found(model: nn.Module) -> list[int | None]:
    """The windows of a model that no table describes, by layer, as its attention was seen to ask for them."""
    seen = [next(iter(found.attention.values()), None) for found in known_layers(model)]
    return [None if attends is None else attends.window for attends in seen]


def known_layers(model: nn.Module) -> list[discovery.Found]:
    """What was found of every layer of a model that no table describes."""
    return [vars(layer)[discovery.FOUND] for layer in layer_list(model)]


def decoder(model: nn.Module) -> nn.Module:
    """The model around the decoder layers, without the output head."""
    found = root = model.base_model
    for part in spec_of(model).layers.removeprefix(f"{model.base_model_prefix}.").split(".")[:-1]:
        root = root.get_submodule(part)
        found = root if isinstance(root, PreTrainedModel) else found
    return found


def returned(model: nn.Module, hidden: Tensor) -> Tensor | tuple:
    """A hidden state in the form in which a decoder layer returns it."""
    entries = spec_of(model).entries
    return (hidden, *[None] * (entries - 1)) if entries else hidden


def replace_layers(model: nn.Module, layers: list[nn.Module]) -> None:
    """Put `layers` in place of the decoder layers and renumber what looks up a cache by layer."""
    parent, _, leaf = spec_of(model).layers.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def tell_shapes(model: nn.Module) -> None:
    """Bring the numbers that modules keep about themselves in line with the present shapes of their weights."""
    for block in blocks(model):
        told = {"intermediate_size": block.width} if block.width and block.read is None else {}
        if block.heads_known:
            told |= {"num_heads": block.heads, "num_key_value_heads": block.kv_heads,
                     "num_key_value_groups": block.heads // block.kv_heads}
        for module in block.module.modules():
            for key in told.keys() & module.__dict__.keys():
                setattr(module, key, told[key])


def attention_modules(model: nn.Module) -> list[nn.Module | None]:
    """The attention module of every layer; None where attention is skipped, or is none of transformers' interface."""
    spec = spec_of(model)
    if not spec.known:
        return [block.attention for block in blocks(model)]
    found = [layer.get_submodule(spec.attention) for layer in layer_list(model)]
    return [None if is_skipped(m) else m for m in found]


def final_norm(model: nn.Module) -> Norm:
    """The norm in front of the output embedding."""
    spec = spec_of(model)
    return _norm(spec, "final", spec.final_norm, at(model, spec.final_norm))


def blocks(model: nn.Module) -> list[Block]:
    """Views of every decoder layer, made anew from the modules' present shapes."""
    spec = spec_of(model)
    if spec.known and not spec.ffn_out:                     # what lies beside its experts is seen, not told
        discovery.found_of(model, spec.layers if model.base_model is not model else
                           spec.layers.removeprefix(f"{model.base_model_prefix}."))
    return [_block(spec, i, layer) for i, layer in enumerate(layer_list(model))]


def _block(spec: Spec, index: int, layer: nn.Module) -> Block:
    name = f"{spec.layers}.{index}"
    if not spec.known:
        return _found_block(spec, index, name, layer)
    attention = layer.get_submodule(spec.attention)
    ffn_skipped = not spec.ffn_out or (spec.ffn is not None and is_skipped(layer.get_submodule(spec.ffn)))
    shape = dict(heads=0, kv_heads=0, head_dim=0, attn_in=[], attn_out=None)
    if is_skipped(attention):
        attention = None
    else:
        shape = _attention_view(spec, f"{name}.{spec.attention}", attention)
    ffn = dict(width=0, ffn_in=[], ffn_out=None) if ffn_skipped else _ffn_view(spec, name, layer)
    norms = {role: _norm(spec, role, f"{name}.{child}", layer.get_submodule(child))
             for role, child in spec.norms if not isinstance(layer.get_submodule(child), nn.Identity)}
    return Block(index, name, layer, attention, norms=norms, form=_form(spec, layer), **shape, **ffn,
                 beside=[] if spec.ffn_out else _beside(name, layer, spec.attention))


def _beside(name: str, layer: nn.Module, attention: str) -> list[list[Projection]]:
    return [[Projection(f"{name}.{child}", layer.get_submodule(child)) for child in group]
            for group in vars(layer)[discovery.FOUND].groups if not group[0].startswith(f"{attention}.")]


def _found_block(spec: Spec, index: int, name: str, layer: nn.Module) -> Block:
    """A layer that no table describes, or parts of it alone; where heads are not known, the sizes that it showed."""
    known: discovery.Found = vars(layer)[discovery.FOUND]
    read = [[Projection(f"{name}.{child}", layer.get_submodule(child)) for child in group] for group in known.groups]
    shape = dict(attention=None, heads=0, kv_heads=0, head_dim=0, attn_in=[], attn_out=None)
    if len(known.attention) == 1:
        (child, seen), = known.attention.items()
        writer = Projection(f"{name}.{seen.writer}", layer.get_submodule(seen.writer)) if seen.writer else None
        readers = next((group for group in read if group[0].name.startswith(f"{name}.{child}.")), [])
        shape = dict(attention=layer.get_submodule(child), heads=seen.heads, kv_heads=seen.kv_heads,
                     head_dim=seen.head_dim, attn_in=readers, attn_out=writer)
        if spec.qkv:
            shape |= _attention_view(spec, f"{name}.{child}", shape["attention"])
    ffn = _ffn_view(spec, name, layer) if spec.ffn_out else dict(width=0, ffn_in=[], ffn_out=None)
    return Block(index, name, layer, **shape, **ffn, norms={}, form="branch_post", read=read)


def _form(spec: Spec, layer: nn.Module) -> Form:
    if spec.form == "parallel" and len(spec.norms) == 2 and not layer.use_parallel_residual:      # GPT-NeoX
        return "pre"
    if spec.ffn_in == ("fc1",) and not layer.do_layer_norm_before:   # OPT-350m
        return "residual_post"
    return spec.form


def _norm(spec: Spec, role: str, name: str, module: nn.Module) -> Norm:
    centred = spec.centred or isinstance(module, nn.LayerNorm)
    return Norm(role, name, module, "layer" if centred else "rms", spec.norm_offset)


def _attention_view(spec: Spec, name: str, module: nn.Module) -> dict[str, Any]:
    readers = [Projection(f"{name}.{child}", module.get_submodule(child)) for child in spec.qkv
               if getattr(module, child) is not None]                       # Gemma-4: keys may be its values, too
    writer = Projection(f"{name}.{spec.out}", module.get_submodule(spec.out))
    dim = getattr(module, spec.head_dim)
    heads = writer.in_features // dim
    if len(spec.qkv) == 3:
        kv_heads = readers[1].out_features // dim
        for reader, part, units in zip(readers, "qkv", (heads, kv_heads, kv_heads), strict=False):
            reader.parts = {part: torch.arange(reader.out_features).view(units, -1)}    # of q also its gates
    else:
        kv_heads = (readers[0].out_features // dim - heads) // 2
        readers[0].parts = _fused_rows(heads, kv_heads, dim, spec.interleaved)
    return dict(heads=heads, kv_heads=kv_heads, head_dim=dim, attn_in=readers, attn_out=writer)


def _fused_rows(heads: int, kv_heads: int, dim: int, interleaved: bool) -> dict[str, Tensor]:
    if interleaved:                                              # [H, 3, D]
        rows = torch.arange(3 * heads * dim).view(heads, 3, dim)
        return {part: rows[:, i] for i, part in enumerate("qkv")}
    rows = torch.arange((heads + 2 * kv_heads) * dim).view(-1, dim)
    q, k, v = rows.split([heads, kv_heads, kv_heads])
    return {"q": q, "k": k, "v": v}


def _ffn_view(spec: Spec, name: str, layer: nn.Module) -> dict[str, Any]:
    readers = [Projection(f"{name}.{child}", layer.get_submodule(child)) for child in spec.ffn_in]
    writer = Projection(f"{name}.{spec.ffn_out}", layer.get_submodule(spec.ffn_out))
    width = writer.in_features
    rows = torch.arange(2 * width if spec.ffn_gated else width).view(-1, width, 1)
    if len(readers) == 2:
        readers[0].parts, readers[1].parts = {"gate": rows[0]}, {"up": rows[0]}
    else:
        readers[0].parts = {"gate": rows[0], "up": rows[1]} if spec.ffn_gated else {"up": rows[0]}
    return dict(width=width, ffn_in=readers, ffn_out=writer)
