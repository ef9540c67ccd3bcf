"""The two matrices with a row for each token of the vocabulary: the input embedding, and an output head of its own.

Rounded to nearest, by the search of grid.py, before the blocks, which then read what they will read later. Plain
transformers loads an embedding in bytes, a scale for each row, beside any symmetric weights, and a head tied to it; at
fewer bits only unpacked at once with all others, alike in bits, groups and zero points (model/stored.py): beside others
it takes `import llmopt`, and plain transformers refuses it. A head of its
own is a linear map like any other. Left out: a head whose codes are chosen for its errors on data, as GPTQ's are.
"""
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import outside
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import spec_of
from llmopt.model.codes import Quantized
from llmopt.model.finite import all_finite
from llmopt.model.forms import BYTES, INTEGERS
from llmopt.model.outside import Outside
from llmopt.model.weights import ROWS, Weight
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.plan import Target, check_divides
from llmopt.quant.settings import Settings


def chosen(step: Settings, model: nn.Module) -> list[tuple[Weight, Spec]]:
    """The matrices that the step names, with their grids."""
    rest, found, at_once = Outside(model), [], spec_of(model).at_once
    if step.head and rest.tied:
        raise FieldError("head", step.head, "null, as it is tied to the embedding here and shares what embedding gives")
    if step.embedding:
        found.append((rest.table, _spec(step, rest.table, step.embedding["bits"], model.dtype, at_once)))
    if step.head:
        found.append((rest.head, _spec(step, rest.head, step.head["bits"], model.dtype, at_once)))
    return found


def _spec(step: Settings, weight: Weight, bits: int, dtype: torch.dtype, at_once: bool) -> Spec:
    """In bytes, or by the groups and zero points of the other weights."""
    in_bytes = bits == 8 and isinstance(weight.module, nn.Embedding)
    size = -1 if in_bytes or not step.says.plain else step.group_size
    check_divides(Target(weight.name, weight.key, "", weight.name, *_shape(weight), size))
    return Spec(bits, size, in_bytes or step.symmetric, step.clip, dtype, step.scale_type(dtype, at_once=at_once),
                BYTES if in_bytes else INTEGERS)


def _shape(weight: Weight) -> tuple[int, int]:
    return tuple(weight.weight.shape)


def sketch(step: Settings, skeleton: nn.Module) -> None:
    """Hangs codes without values on the matrices."""
    for weight, spec in chosen(step, skeleton):
        rows, columns = _shape(weight)
        empty = partial(torch.empty, rows, device="meta")
        scales = empty(columns // spec.width(columns), dtype=spec.stored)
        weight.codes = Quantized(empty(columns, dtype=torch.int8), scales, spec.bits, spec.group_size,
                                 None if spec.symmetric else torch.empty_like(scales), form=spec.form)


def quantize(step: Settings, model: nn.Module, run: Run) -> dict[str, dict]:
    """Write codes into the model; what a record says of each matrix, by name."""
    todo = chosen(step, model)
    for _ in outside(model, run) if todo else ():
        for weight, spec in todo:
            _write(weight, spec)
    return {weight.name: {"bits": spec.bits, "group_size": spec.group_size, **weight.codes.figures}
            for weight, spec in todo}


@torch.no_grad()
def _write(weight: Weight, spec: Spec) -> None:
    """Some rows after the other, as a vocabulary is large."""
    if not all_finite(weight.weight):
        raise LlmoptError(f"{weight.name}: the weight holds NaN or infinite values")
    parts, lost, total = [], 0.0, 0.0
    for rows in weight.weight.split(ROWS):
        dense = rows.float()
        parts.append(round_to_nearest(dense.clone(), spec))
        rows.copy_(parts[-1].dequantize(spec.dtype))
        lost, total = lost + float((rows.float() - dense).square().sum()), total + float(dense.square().sum())
    weight.codes = replace(parts[0], codes=_joined(parts, "codes"), scales=_joined(parts, "scales"),
                           zeros=None if parts[0].zeros is None else _joined(parts, "zeros"),
                           figures={"weight_error": lost / max(total, 1e-30)})


def _joined(parts: list[Quantized], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])
