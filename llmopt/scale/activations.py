"""What running blocks over calibration data takes of the memory, from shapes: the walk's part of every forecast."""
from torch import nn

from llmopt.model.blocks import Block
from llmopt.model.computing import compute_type
from llmopt.scale.room import Scene


def hidden_size(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[1]


def logits(model: nn.Module, tokens: int, copies: int = 1) -> int:
    """The model's answer to `tokens`, and `copies` of it in float32."""
    return tokens * model.get_output_embeddings().weight.shape[0] * (compute_type(model).itemsize + 4 * copies)


def forward(model: nn.Module, block: Block, rows: int, length: int) -> int:
    """At the peak of one block's forward: hidden states, and what the attention or the FFN has in hand."""
    size, hidden = compute_type(model).itemsize, hidden_size(model)
    width = block.width or 4 * hidden               # experts are not seen as an FFN; few of them work at once
    mixing = 4 * (block.heads + 2 * block.kv_heads) * block.head_dim * size        # projected, rotated, repeated
    if model.config._attn_implementation == "eager":
        mixing += block.heads * length * (2 * size + 4)                            # the map in full
    weights = max((p.out_features * p.in_features for p in block.projections()), default=0)
    converted = 0 if size == model.dtype.itemsize else weights * size              # one weight in the other type
    return rows * length * (2 * hidden * size + max(8 * hidden, mixing, 4 * width * size)) + converted


def observing(model: nn.Module, block: Block, scene: Scene) -> int:
    """Peak of a block's forward on calibration data, while a hook takes in a projection's widest input in float32."""
    rows, length = scene.largest
    widest = max((p.in_features for p in block.projections()), default=0)
    return forward(model, block, rows, length) + rows * length * widest * (compute_type(model).itemsize + 4)


def kept(model: nn.Module, scene: Scene, sets: int) -> int:
    """Hidden states of all calibration data `sets` times, and the masks that its padding needs."""
    if not sets:
        return 0
    whole = scene.tokens * hidden_size(model) * compute_type(model).itemsize
    masks = scene.padded * sum(rows * length * length for rows, length in scene.shapes)
    if scene.activations is None:
        return sets * whole + masks
    return sets * min(whole, scene.activations // 3) + min(masks, scene.activations // 3)      # see Streamed.keeper
