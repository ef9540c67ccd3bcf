"""The loss's slopes in what places inside the blocks read, one block at a time, the last one first.

    forwards: what every block reads is kept; backwards: each runs again from that, with gradients,
    and dL/d(what it writes) becomes dL/d(what it reads)

L is the sum over the samples of their mean next-token losses. No weight gets a gradient, but in `weights_backward`, one
block's at a time and for the caller's eyes alone. No more than one block's
weights and inner activations are there at a time: in memory batch by batch, streamed with all batches at once, as
every pass over the blocks reads them from disk. Beside them wait the hidden states in front of all blocks.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from llmopt.calibration.calls import decoded_behind
from llmopt.calibration.losses import loss_slopes
from llmopt.calibration.trials import part
from llmopt.calibration.walk import Visit, refuse_without_data, walk
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, layer_list

Batch = dict[str, Tensor]
Places = Callable[[Block], list[Projection]]
See = Callable[[Projection, Tensor, Tensor], None]
Down = Callable[[Visit, list[Tensor]], Iterator[Tensor]]        # through a block, from what it writes to what it reads


def backward(model: nn.Module, run: Run, label: str, places: Places, see: See) -> None:
    """Call `see(projection, x, dL/dx)`, x [B, T, in], of every batch of this process and each of a block's `places`.

    Both are float32 at least, and 0 at padding. The model comes out of it as it was.
    """
    _all(model, run, label, partial(_back, places=places, see=see))


def weights_backward(model: nn.Module, run: Run, label: str, places: Places,
                     see: Callable[[Projection, Tensor], None]) -> None:
    """Call `see(projection, dL/dW [out, in])` of every batch of this process and each of a block's `places`."""
    _all(model, run, label, partial(_back_to_weights, places=places, see=see))


def _all(model: nn.Module, run: Run, label: str, down: Down) -> None:
    refuse_without_data(run)
    parcels = run.memory.parcels(run.own_batches)
    with undisturbed(model):
        model.requires_grad_(False)
        for number, parcel in enumerate(parcels, 1):
            _through(model, run, parcel, f"{label} {number} of {len(parcels)}", down)


def _through(model: nn.Module, run: Run, batches: list[Batch], label: str, down: Down) -> None:
    count = len(layer_list(model))
    memory = run.memory.reading.holding(count + 4)          # hidden states, slopes of two blocks, the walk's masks
    stops = [*walk(model, batches, run.progress, label, memory)]
    hidden = stops[-1].outputs_after_edit
    with memory.outside(model, head=True):
        slopes = memory.keep(_slope_behind(model, *both) for both in zip(batches, hidden, strict=True))
    for index in run.progress(range(count - 1, -1, -1), f"{label}, backwards"):
        with memory.block(model, index):
            slopes = memory.keep(down(stops.pop(), slopes))


def _slope_behind(model: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:             # [B, T, E]
    """dL/dhidden of what the last block wrote."""
    ids, mask = (batch[key].to(model.device) for key in ("input_ids", "attention_mask"))
    with torch.enable_grad():
        hidden = hidden.to(model.device).detach().requires_grad_()
        decoded = decoded_behind(model, batch, hidden)
        return torch.autograd.grad(decoded, hidden, loss_slopes(model, decoded.detach(), ids, mask))[0]


def _back(visit: Visit, slopes: list[Tensor], places: Places, see: See) -> Iterator[Tensor]:
    """dL/d(what the block reads) by dL/d(what it writes), batch by batch."""
    shown = places(visit.block)
    for index, slope in enumerate(slopes):
        here, read = part(visit, slice(index, index + 1)), {}
        here.inputs[0] = x = here.inputs[0].detach().requires_grad_()
        with torch.enable_grad(), _reading(shown, read):
            out = here.forward(0)
        below, *found = torch.autograd.grad(out, [x, *(read[place.name] for place in shown)], slope.to(out))
        padding = ~here.masks[0][..., None]                                                             # [B, T, 1]
        for place, there in zip(shown, found, strict=True):
            see(place, *(_wide(tensor, padding) for tensor in (read[place.name].detach(), there)))
        yield below.masked_fill(padding.to(below.device), 0)


def _back_to_weights(visit: Visit, slopes: list[Tensor], places: Places,
                     see: Callable[[Projection, Tensor], None]) -> Iterator[Tensor]:
    """The same, where `see` is shown the slopes in weights."""
    shown = places(visit.block)
    for index, slope in enumerate(slopes):
        here = part(visit, slice(index, index + 1))
        here.inputs[0] = x = here.inputs[0].detach().requires_grad_()
        weights = [getattr(place.module, place.parameter).detach().requires_grad_() for place in shown]
        keys = [place.key.removeprefix(f"{visit.block.name}.") for place in shown]
        with torch.enable_grad():
            out = here.forward(0, dict(zip(keys, weights, strict=True)))
        below, *found = torch.autograd.grad(out, [x, *weights], slope.to(out))
        for place, there in zip(shown, found, strict=True):
            see(place, there.T if place.transposed else there)
        yield below.masked_fill(~here.masks[0][..., None].to(below.device), 0)


def _wide(x: Tensor, padding: Tensor) -> Tensor:                                        # [B, T, in] float32
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.reshape(*padding.shape[:2], -1).to(wide).masked_fill(padding.to(x.device), 0)


@contextmanager
def _reading(places: list[Projection], read: dict[str, Tensor]) -> Iterator[None]:
    """Note what each place reads, by its name, still part of the graph."""
    def note(name: str, module: nn.Module, args: tuple) -> None:
        read[name] = args[0]

    handles = [place.module.register_forward_pre_hook(partial(note, place.name)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; modes and requires_grad come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
