"""A walk over the blocks that stay, while parts are about to leave: what has to be written in the place of these.

    wanted = what the block, whole, and those behind it that leave make of what the block reads once others have left
"""
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from llmopt.calibration.calls import record_calls
from llmopt.calibration.trials import without
from llmopt.calibration.walk import Visit
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, layer_list

LISTS = 5           # of activations held at once: a block's inputs, its outputs, two of `wanted`, the masks
Leaving = Mapping[int, Collection[str]]         # by block, which of attention and mlp leave, or "blocks" for all of it


def visits_in_place(model: nn.Module, run: Run, label: str, leaving: Leaving) -> Iterator[Visit]:
    """Visits, for a caller who edits, of the blocks that stay and lose a part or stand in front of one that leaves.

    `visit.wanted`: see above. Parts that leave write nothing any more once the visit begins. Of several processes each
    sees its own rows.
    """
    if not run.batches:
        raise LlmoptError("this step needs calibration data and there is none")
    count = len(layer_list(model))
    stay = [index for index in range(count) if not _whole(leaving.get(index, ()))]
    behind = dict(zip(stay, [*stay[1:], count], strict=True))             # the next block that stays
    memory = run.memory.editing().holding(LISTS)
    edited = [index for index in stay if index in leaving or behind[index] > index + 1]
    ahead = [index for index in edited if not memory.restored(model, index)]
    if not ahead:
        return
    hidden, calls = record_calls(model, run.own_batches, memory)
    masks = [batch["attention_mask"].bool() for batch in run.own_batches]
    for index in run.progress([index for index in stay if index <= ahead[-1]], label):
        wanted = hidden
        for inner in range(index, behind[index]) if index in ahead else ():
            with memory.reading.block(model, inner):
                wanted = memory.keep(Visit(model, blocks(model)[inner], wanted, calls[inner], masks).outputs())
        with (memory if index in ahead else memory.reading).block(model, index):
            visit = Visit(model, blocks(model)[index], hidden, calls[index], masks)
            if index in ahead:
                silence(visit.block, leaving.get(index, ()))
                visit.wanted = wanted
                yield visit
                visit.wanted = None
            hidden = memory.keep(visit.outputs())


def silence(block: Block, parts: Collection[str]) -> None:
    """Let parts of a block ("attention", "mlp") write nothing."""
    for name, zeros in without(block, parts).items():
        block.module.get_parameter(name.removeprefix(f"{block.name}.")).data.copy_(zeros)


def _whole(parts: Collection[str]) -> bool:
    return "blocks" in parts or {"attention", "mlp"} <= set(parts)
