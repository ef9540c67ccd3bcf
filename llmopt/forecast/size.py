"""What a recipe will do and how large its checkpoint will be, before anything is computed.

Every step sketches its edit on a skeleton without weights. Pruning plans that need no data are made for real, once: the
run finds them decided. Exact where names and shapes decide the bits; with `allocate: sensitivity` every weight is
counted at the average.
"""
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmopt.checkpoint.compressed_tensors import needed, refuse_unequal
from llmopt.errors import LlmoptError, naming
from llmopt.files import shards
from llmopt.forecast.memory import saving_bytes
from llmopt.method import UNCHANGED, Method, Run
from llmopt.model.levels import refuse_below
from llmopt.model.outline import filed, outline
from llmopt.model.shapes import LayerShape, shapes
from llmopt.model.state import packs
from llmopt.model.stored import refuse_rounded_inputs, refuse_unportable
from llmopt.model.usable import check_model


class Prediction(NamedTuple):
    """bytes: of the checkpoint's safetensors. steps: [[step, what it will do]]. layers: as each step finds them.

    tensors: the checkpoint's, without values. saving: see forecast.memory.saving_bytes. needs: sentences on what
    of it only llmopt loads.
    """

    bytes: int
    steps: list[list[str]]
    layers: list[list[LayerShape]]
    tensors: dict[str, Tensor]
    saving: int
    needs: list[str]

    def takes_parts(self, index: int) -> bool:
        """True if a step removes blocks, or attentions or FFNs as a whole."""
        before, after = self.layers[index], self.layers[index + 1]
        return len(before) > len(after) or sum(len(s.skip) for s in before) < sum(len(s.skip) for s in after)


@torch.no_grad()
def predict(model: nn.Module, steps: list[Method], format: str = "portable", run: Run | None = None,
            max_shard_size: str = shards.LARGEST) -> Prediction:
    """Foretell the result of `steps` on `model`, which is left as it is.

    A pruning step whose scores are not known yet (it needs calibration data, or follows another one) is counted with as
    many units as it will remove, whichever they are: exact where its scope is local. run: the one to come; what it
    remembers of its decisions is not decided again. Raises LlmoptError for a model that cannot be compressed.
    """
    check_model(model, streamed=True)
    skeleton, told, source = outline(model), [], model
    layers = [shapes(skeleton)]
    run = Run() if run is None else replace(run)
    for i, step in enumerate(steps):
        run.ahead = tuple(steps[i + 1:])
        run.memory.begin(i)
        with naming(f"steps.{i} {step.name}"):
            refuse_below(skeleton, step.level, step.name)
            told.append([step.name, step.sketch(skeleton, run, source)])
        layers.append(shapes(skeleton))
        source = source if step.stage in UNCHANGED else None
    tensors = _tensors(skeleton, format)
    size = shards.files_bytes(tensors, max_shard_size)
    return Prediction(size, told, layers, tensors, saving_bytes(skeleton, tensors),
                      needed(skeleton) if packs(skeleton, format) else [])


@torch.no_grad()
def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the safetensors that `save` would write of a model as it is, packed where the format can hold that."""
    skeleton = outline(model)
    try:
        return shards.file_bytes(_tensors(skeleton, "portable"))
    except LlmoptError:
        return shards.file_bytes(_tensors(skeleton, "dense"))


def _tensors(skeleton: nn.Module, format: str) -> dict[str, Tensor]:
    """The tensors of the checkpoint; raises LlmoptError for what its format cannot hold."""
    if packs(skeleton, format):
        refuse_unportable(skeleton)
        refuse_unequal(skeleton)
    else:
        refuse_rounded_inputs(skeleton)
    return filed(skeleton, format)
