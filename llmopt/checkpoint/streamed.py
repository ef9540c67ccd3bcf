"""The checkpoint that a streamed run writes: block by block, and read back block by block."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.place import staged
from llmopt.checkpoint.verify import VerificationError
from llmopt.files import own, shards, tensors
from llmopt.model import skeleton
from llmopt.model.expert_files import as_written, stacked, taken_apart
from llmopt.model.finite import all_finite
from llmopt.model.state import as_filed, plain_state
from llmopt.model.weights import coded
from llmopt.scale.stream import Streamed


class StreamedWeights(checkpoint.Weights):
    """A streamed model's weights for `checkpoint.save`: written block by block, and read back block by block."""

    def __init__(self, model: nn.Module, memory: Streamed):
        super().__init__(model, memory.format)
        self.memory = memory

    def write(self, stage: Path, max_shard_size: str) -> None:
        with shards.full_disks():
            writer = shards.Writer(stage, max_shard_size)
            for group in self.memory.groups(self.model):
                writer.add(group)
            writer.close()

    @torch.no_grad()
    def verify(self, stage: Path) -> None:
        """Raise VerificationError unless every tensor reads back as it was written and has the config's shape."""
        written, expected = tensors.places(stage), set()
        for group in self.memory.groups(self.model):
            if absent := group.keys() - written.keys():
                raise VerificationError(f"{stage.name}: {min(absent)} was not written")
            back = tensors.read({name: written[name] for name in group})
            for name, tensor in group.items():
                if not _equal(back[name], tensor.cpu()) or not all_finite(tensor):
                    raise VerificationError(f"{stage.name}: {name} does not read back as it was written")
            expected |= group.keys()
        if foreign := written.keys() - expected:
            raise VerificationError(f"{stage.name}: {min(foreign)} belongs to no part of the model")
        _verify_shapes(stage, written, self.model)


def _verify_shapes(stage: Path, written: tensors.Places, model: nn.Module) -> None:
    """Raise VerificationError unless the written config makes a model of the written shapes; `model` has the names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(stage)
    fresh = skeleton.skeleton(config, config.dtype)
    fresh._weight_conversions = model._weight_conversions
    wanted, packed = plain_state(fresh, renamed=False), "quantization_config" in config.to_dict()
    wanted = taken_apart(fresh, as_written(model, wanted)) if packed else wanted
    for name, like in (as_filed(fresh, wanted) if not packed or stacked(coded(model)) else wanted).items():
        shape = _shape(name, written)
        if shape is None:
            raise VerificationError(f"{stage.name}: the config wants {name}, which was not written")
        if shape != list(like.shape):
            raise VerificationError(f"{stage.name}: {name} is {shape}, the config wants {list(like.shape)}")


def _shape(name: str, written: tensors.Places) -> list[int] | None:
    """The shape of a weight that was written as it is, or packed; None for one that was not written."""
    place = next((written[key] for key in (name, f"{name}_shape", f"{name}_packed") if key in written), None)
    if place is None:
        return None
    known = tensors.read({"it": place})["it"]
    if f"{name}_shape" in written:
        return known.tolist()
    return list(known.shape) if name in written else [len(known), 2 * known.shape[1]]       # two numbers in a byte


def _equal(one: Tensor, other: Tensor) -> bool:
    """torch.equal, which does not know small floats."""
    return torch.equal(*(t.view(torch.uint8) if t.itemsize == 1 else t for t in (one, other)))


def save_partial(weights: StreamedWeights, output: Path, max_shard_size: str,
                 finish: Callable[[Path], None]) -> None:
    """Write the weights of a model that was cut short; without a config, nothing loads them."""
    with staged(output, weights.memory.work) as stage:
        weights.write(stage, max_shard_size)
        shards.write_text(stage / own.PARTIAL, "The first blocks of a model, written to measure memory and time.\n")
        finish(stage)
