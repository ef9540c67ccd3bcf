"""Weights with codes as the tensors that compressed-tensors keeps in a file for them, and back.

    pack-quantized        W_packed int32 [out, ceil(in b / 32)], W_scale, W_shape, with zero points W_zero_point int32
    int-quantized         W int8, W_scale                       (bytes, and integers whose inputs are rounded, too)
    float-quantized       W e4m3, W_scale: of a channel [out, 1], the tensor [1], or blocks [out / 128, in / 128]
    nvfp4-pack-quantized  W_packed uint8 [out, in / 2], W_scale e4m3, W_global_scale float32 [1]
    mxfp4-pack-quantized  W_packed uint8 [out, in / 2], W_scale uint8: 127 + the exponent
    mxfp8-quantized       W e4m3, W_scale uint8

Beside them, of inputs whose range is known beforehand, input_scale or input_global_scale [1].
"""
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmopt.model.codes import Quantized, pack, unpack
from llmopt.model.forms import BYTES, E4M3, FORMS, Form, over
from llmopt.model.weights import Weight

SIZES = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])        # of e2m1 numbers, by their three lower bits
BIAS = 127


def format_of(codes: Quantized) -> str:
    """compressed-tensors' name for how such a weight lies in a file."""
    if not codes.form.is_float:
        return "int-quantized" if codes.inputs or codes.form == BYTES else "pack-quantized"
    return {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized",
            "mxfp8": "mxfp8-quantized"}.get(codes.form.name, "float-quantized")


def packed(weight: Weight) -> dict[str, Tensor]:
    """The tensors of one weight with codes under their checkpoint names; without values, those shapes."""
    codes, stem = weight.codes, weight.stem
    bare = not codes.form.halves and format_of(codes) != "pack-quantized"
    made = {stem if bare else f"{stem}_packed": _numbers(codes), f"{stem}_scale": _scales(codes)}
    if format_of(codes) == "pack-quantized":
        made[f"{stem}_shape"] = torch.tensor(codes.codes.shape)                           # [2] int64
    if codes.zeros is not None:
        made[f"{stem}_zero_point"] = pack(codes.zeros, codes.bits, 0)                     # [ceil(out b / 32), groups]
    if codes.form.scales == "e4m3":
        made[f"{stem}_global_scale"] = torch.tensor([codes.whole])
    if codes.peak is not None:
        name, scale = input_scale(codes, weight.weight.dtype)
        made[f"{weight.path}.{name}"] = scale
    return made


def input_scale(codes: Quantized, dtype: torch.dtype) -> tuple[str, Tensor]:
    """(name, value [1]) of the scale that belongs to the largest input."""
    if codes.form.scales == "e4m3":
        return "input_global_scale", torch.tensor([codes.form.most * 448]) / codes.peak
    return "input_scale", (torch.tensor([codes.peak]) / codes.form.most).to(dtype)


def _numbers(codes: Quantized) -> Tensor:
    if codes.form.halves:
        return _pairs(codes.codes)
    if codes.form.is_float:
        return codes.codes.to(E4M3) if codes.codes.is_meta else codes.codes.cpu().contiguous().view(E4M3)
    return pack(codes.codes, codes.bits) if format_of(codes) == "pack-quantized" else codes.codes


def _scales(codes: Quantized) -> Tensor:
    scales, form = codes.scales if codes.scales.is_meta else codes.scales.cpu(), codes.form
    if form.scales == "e8m0":
        return scales.to(torch.uint8) if scales.is_meta else (scales.frexp().exponent - 1 + BIAS).to(torch.uint8)
    if form.scales == "e4m3":
        return (scales * codes.whole).to(E4M3)
    shared = scales[::form.rows or len(scales)].contiguous()
    return shared.flatten() if form.rows == 0 else shared


def _pairs(codes: Tensor) -> Tensor:
    """e2m1 numbers as bits of e4m3 ones, two in a byte, the first in its lower half."""
    if codes.is_meta:
        return codes[:, ::2].to(torch.uint8)
    places = torch.zeros(128, dtype=torch.uint8)
    places[SIZES.to(E4M3).view(torch.uint8).long()] = torch.arange(8, dtype=torch.uint8)
    bits = codes.cpu().contiguous().view(torch.uint8)
    halves = places[(bits & 127).long()] | (bits >> 7 << 3)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def _apart(pairs: Tensor) -> Tensor:
    """What `_pairs` was made of."""
    halves = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)
    sizes = SIZES.to(E4M3).view(torch.uint8)[(halves & 7).long()]
    return (sizes | (halves >> 3 << 7)).view(torch.int8)


def kept(codes: Quantized) -> dict[str, Any]:
    """The facts about codes that their tensors do not tell, as plain JSON data."""
    facts = {"bits": codes.bits, "group_size": codes.group_size, "form": codes.form.name, "whole": codes.whole,
             "inputs": codes.inputs, "peak": codes.peak}
    return {key: value for key, value in facts.items() if value is not None}


def unpacked(tensors: dict[str, Tensor], stem: str, facts: dict[str, Any]) -> Quantized:
    """The codes that `packed` and `kept` told of."""
    facts = dict(facts)
    form = FORMS[facts.pop("form", "int")]
    bits, known = facts["bits"], Quantized(None, None, form=form, **facts)
    numbers, scales = tensors.get(stem, tensors.get(f"{stem}_packed")), tensors[f"{stem}_scale"]
    zeros = tensors.get(f"{stem}_zero_point")
    if format_of(known) == "pack-quantized":
        shape = tensors[f"{stem}_shape"].tolist()
        known.codes, known.scales = unpack(numbers, bits, shape), scales
        known.zeros = None if zeros is None else unpack(zeros, bits, (shape[0], scales.shape[1]), 0)
    else:
        known.codes = _apart(numbers) if form.halves else numbers.view(torch.int8)
        known.scales = _spread(scales, form, known)
    return known


def facts_of(weights: Mapping[str, Any], kind: str | None, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bits, group size and form of weights in compressed-tensors' words; kind: how they lie in a file."""
    strategy, bits = weights["strategy"], weights["num_bits"]
    form = "bytes" if kind == "int-quantized" and not inputs else "int"
    if weights["type"] == "float":
        form = {"channel": "fp8", "tensor": "fp8 tensor", "block": "fp8 block", "tensor_group": "nvfp4",
                "group": f"mxfp{bits}"}[strategy]
    size = weights["block_structure"][1] if strategy == "block" else weights.get("group_size") or -1
    return {"bits": bits, "group_size": size, "form": form}


def read_off(weight: Tensor, scales: Tensor, known: Quantized) -> Quantized:
    """The codes of a weight [out, in] that a loader has unpacked, and its scales; known: all else.

    scales: what compressed-tensors leaves beside it: e4m3 numbers and powers of two as numbers of the model's type.
    """
    form, known.codes = known.form, weight
    known.scales = (_spread(scales, form, known) if form.scales == "model" else
                    over(scales.to(E4M3), known.whole) if form.scales == "e4m3" else scales.float())
    steps = weight.float().unflatten(1, (known.scales.shape[1], -1)) / known.scales.float().unsqueeze(-1)
    steps = steps.nan_to_num(0, 0, 0).flatten(1)                                # a scale of 0 stands for zeros
    known.codes = form.kept(form.nearest(steps) if form.is_float else steps.round(), known.bits)
    return known


def peak_of(name: str, scale: Tensor, codes: Quantized) -> float | None:
    """The largest input, of which `input_scale` makes this scale of this name; None where there is no such number."""
    about = float(scale) * codes.form.most if name == "input_scale" else codes.form.most * 448 / float(scale)
    about = torch.tensor(about)
    for peak in (about, *(about.nextafter(torch.tensor(far)) for far in (0.0, torch.inf))):
        made, value = input_scale(replace(codes, peak=float(peak)), scale.dtype)
        if made == name and torch.equal(value, scale.cpu()):
            return float(peak)
    return None


def _spread(scales: Tensor, form: Form, codes: Quantized) -> Tensor:
    """Stored scales as they are kept beside codes: of each row and group, as what they stand for."""
    if form.scales == "e8m0":
        return torch.ldexp(torch.ones(scales.shape), scales.int() - BIAS)
    if form.scales == "e4m3":
        return over(scales, codes.whole)
    rows = len(codes.codes)
    return scales.view(-1, 1).expand(rows, 1) if form.rows == 0 else \
        scales.repeat_interleave(form.rows, 0)[:rows]
