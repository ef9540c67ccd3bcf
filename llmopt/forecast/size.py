"""What a recipe will do and how large its checkpoint will be, before anything is computed: `compress --dry-run`.

Pruning plans are made for real (on a skeleton without weights), quantized sizes follow from names and shapes. Exact
where these decide the bits; with `allocate: sensitivity` every weight is counted at the average.
"""
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError, naming
from llmopt.files import shards
from llmopt.forecast.memory import Forecast, Peak
from llmopt.method import Method, Run
from llmopt.model import state
from llmopt.model.blocks import spec_of
from llmopt.model.codes import DTYPES
from llmopt.prune.surgery import apply_plan
from llmopt.quant.plan import DENSE, Target
from llmopt.scale.memory import Memory
from llmopt.scale.room import Scene


class Prediction(NamedTuple):
    """bytes: of the checkpoint's safetensors. steps: [[step, what it will do]]. peaks: of memory, part by part."""

    bytes: int
    steps: list[list[str]]
    peaks: list[Peak]

    @property
    def peak(self) -> Peak:
        """The part that takes the most private memory."""
        return max(self.peaks, key=lambda peak: peak.private)


@torch.no_grad()
def predict(model: nn.Module, steps: list[Method], format: str = "portable", seed: int = 0,
            memory: Memory = Memory(), scene: Scene = Scene()) -> Prediction:     # noqa: B008  frozen, or empty
    """What `steps` will make of `model`, which is left as it is, and what that takes.

    A pruning step whose scores are not known yet (it needs calibration data, or follows another one) is counted with as
    many units as it will remove, whichever they are: exact where its scope is local.
    """
    skeleton, told, packed = _skeleton(model), [], {}
    forecast = Forecast(skeleton, scene)
    forecast.check()
    run = Run(seed=seed, memory=memory)
    pruned = False
    for i, step in enumerate(steps):
        run.ahead = tuple(steps[i + 1:])
        with naming(f"steps.{i} {step.name}"):
            rooms = step.rooms(skeleton, scene)
            if step.stage == "prune":
                text = _prune(skeleton, step, run, None if pruned or step.uses_inputs else model)
                pruned = True
            elif step.stage == "transform":
                text = step.sketch(skeleton, run)
            elif step.stage == "quant":
                text = _quantize(skeleton, step, packed)
            else:
                text = ", ".join(f"{k} {v}" for k, v in step.to_dict()[step.name].items() if v is not None)
        forecast.step(f"steps.{i} {step.name}", rooms)
        told.append([step.name, text])
    tensors = state.plain_state(skeleton, renamed=format != "portable" or not packed)
    if format == "portable":
        tensors = {k: t for key, dense in tensors.items() for k, t in packed.get(key, {key: dense}).items()}
    forecast.save(tensors)
    return Prediction(shards.file_bytes(tensors), told, forecast.peaks)


def _skeleton(model: nn.Module) -> nn.Module:
    """The model's shapes on the meta device."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _prune(skeleton: nn.Module, step: Method, run: Run, model: nn.Module | None) -> str:
    """Cut the step's plan out of the skeleton; model: where its scores can be read already, else None."""
    step.refuse(skeleton)
    plan, meta = step.guess(skeleton, run) if model is None else step.plan(model, run)
    apply_plan(skeleton, plan, Run())
    gone = ", ".join(f"{n} {kind}" for kind, n in meta["removed_units"].items() if n)
    return f"removes {'about ' * (model is None)}{meta['removed_share']:.1%} of {', '.join(step.units)}: {gone}"


def _quantize(skeleton: nn.Module, step: Method, packed: dict[str, dict[str, Tensor]]) -> str:
    scale = DTYPES[step.scale_dtype] if step.scale_dtype else skeleton.dtype
    found = step.planned(skeleton)
    if not found:
        raise LlmoptError("nothing is left to quantize")
    for t in found:
        if t.bits != DENSE:
            packed[t.key] = _packed(t, scale)
    return (f"{len(found)} weights at {step.bits:g} bits, "
            + ("one scale per channel" if step.group_size == -1 else f"groups of {step.group_size}")
            + (f", bits by {step.allocate}" if step.allocate != "uniform" else "")
            + (f" ({note})" if (note := spec_of(skeleton).note) else ""))


def _packed(t: Target, scale: torch.dtype) -> dict[str, Tensor]:
    words = -int(-t.columns * t.bits // 32)
    return {f"{t.key}_packed": torch.empty(t.out, words, dtype=torch.int32, device="meta"),
            f"{t.key}_scale": torch.empty(t.out, t.groups, dtype=scale, device="meta"),
            f"{t.key}_shape": torch.empty(2, dtype=torch.int64, device="meta")}
