"""How much memory a run will take: what one block took, the other blocks like it, and what is known from shapes.

In memory, weights are mapped from their files and become private where a step rewrites them; that and the codes beside
them stay until the checkpoint is written. Streamed, all of that lasts for one block. Shapes alone tell what writing and
verifying a checkpoint takes, and what a step that works on the whole model takes at least.
"""
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from llmopt.checkpoint.verify import probe_length
from llmopt.files import shards
from llmopt.method import Method
from llmopt.model.blocks import Block, blocks
from llmopt.model.computing import compute_type
from llmopt.model.head import LOGITS
from llmopt.model.state import tied_names
from llmopt.model.weights import coded
from llmopt.scale import pages


class Peak(NamedTuple):
    """The most private memory that one part of a run takes, in bytes above what the imports took; see gauge.Taken."""

    part: str
    private: int


def advice(peak: Peak, free: int, streamed: bool, batches: bool) -> list[str]:
    """Lines of advice where memory will not suffice; none where it will."""
    if peak.private <= free:
        return []
    ways = ["a machine with more memory"]
    if batches:
        ways.insert(0, "fewer data.samples, a smaller data.batch_size or data.length")
    ways.insert(0, "a smaller --activation-memory" if streamed else "--stream")
    return [f"{peak.part} will take {peak.private / 1e9:.1f} GB, {free / 1e9:.1f} GB are available; "
            f"what helps: {', '.join(ways)}"]


def private_bytes(root: nn.Module) -> int:
    """Bytes of the weights below a module that are not, or no longer, pages of the model's files, and of their codes.

    Weights on the meta device or a GPU take none.
    """
    own = [p for p in root.parameters() if p.device.type == "cpu"]
    return sum(pages.private_bytes(p.data_ptr(), p.nbytes) for p in own) + code_bytes(root)


def code_bytes(root: nn.Module) -> int:
    """Bytes of the codes of the weights below a module, their scales included; none on the meta device or a GPU."""
    made = [part for weight in coded(root) for part in vars(weight.codes).values() if isinstance(part, Tensor)]
    return sum(tensor.nbytes for tensor in made if tensor.device.type == "cpu")


def whole_bytes(step: Method, model: nn.Module, rows: int, length: int) -> int:
    """Bytes beside the weights that a step which needs_whole takes at least, for batches of rows x length tokens.

    A bound from shapes, of a skeleton too: a backward pass where the step says so, and what it learns: numbers, slopes,
    two moments, the best state, in float32.
    """
    tokens = step.backward(rows, length)
    return (_backward_bytes(model, tokens) if tokens else 0) + 5 * 4 * step.learned_numbers(model)


def held_bytes(step: Method, model: nn.Module, batches: list[dict[str, Tensor]] | None) -> int:
    """Bytes that wait in front of each block while a step goes back through them one by one: one batch's hidden states.

    Nothing for a step that takes no gradients, or those of the whole model at once.
    """
    if step.needs_whole or not batches:
        return 0
    tokens = max(step.backward(*batch["input_ids"].shape) for batch in batches)
    return tokens * model.get_input_embeddings().weight.shape[1] * compute_type(model).itemsize


def _backward_bytes(model: nn.Module, tokens: int) -> int:
    """The inputs of norms and products, which the backward pass of a batch reads, and its logits, some at a time."""
    size, (vocabulary, hidden) = compute_type(model).itemsize, model.get_input_embeddings().weight.shape
    token = sum(_read_backwards(block, hidden, size) for block in blocks(model))
    return tokens * token + 12 * min(tokens * vocabulary, max(LOGITS, vocabulary))    # logits, logarithms, slopes


def _read_backwards(block: Block, hidden: int, size: int) -> int:
    """Bytes for each token."""
    readers = sum(p.out_features for p in block.attn_in + block.ffn_in)
    writers = sum(p.in_features for p in (block.attn_out, block.ffn_out) if p is not None)
    return len(block.norms) * hidden * 4 + (readers + 2 * writers) * size


def saving_bytes(skeleton: nn.Module, tensors: dict[str, Tensor]) -> int:
    """Private bytes on top of a model in memory while these tensors of its checkpoint are written and verified.

    Either what is packed for the files, or what the fresh model inflates and both models' answers.
    """
    own, tied = dict(skeleton.named_parameters(remove_duplicate=False)), tied_names(skeleton)
    made = {name: tensor for name, tensor in tensors.items() if name not in own or tensor.dtype != own[name].dtype}
    inflated = {name: tensor for name, tensor in own.items() if f"{name}_scale" in tensors or
                name not in tensors and name not in tied}
    return max(shards.tensor_bytes(made), shards.tensor_bytes(inflated) + _answer_bytes(skeleton))


def _answer_bytes(model: nn.Module) -> int:
    """Two answers to the probe of the verification, in float32 too, and a block's forward that leads to one."""
    size, (vocabulary, hidden) = compute_type(model).itemsize, model.get_output_embeddings().weight.shape
    widest = max((block.width or 4 * hidden for block in blocks(model)), default=0)
    return 2 * probe_length(model) * (vocabulary * (size + 16) + hidden * (2 * size + 8) + 4 * widest * size)


def shard_bytes(tensors: dict[str, Tensor], converted: Collection[str], most: int) -> int:
    """Private bytes while a streamed checkpoint is written: what of a shard is not mapped from a file."""
    return min(shards.tensor_bytes({name: tensor for name, tensor in tensors.items() if name in converted}), most)
