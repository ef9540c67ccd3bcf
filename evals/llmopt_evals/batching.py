"""Batches of evaluation requests by their tokens, as many as the memory holds."""
from torch import nn

from llmopt.errors import LlmoptError
from llmopt.model.blocks import blocks
from llmopt.model.computing import compute_type
from llmopt.scale.available import available
from llmopt_evals.readout import CHUNK

TOKENS = 8192           # of a batch, padding included: more is no faster
SHARE = 0.5             # of the available memory that a batch may take


def token_bytes(model: nn.Module) -> int:
    """Bytes that a forward without a cache holds at its peak for each token: the widest block's activations."""
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}   # positions, too
    matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in tables]
    width = model.get_input_embeddings().weight.shape[1]
    inner = max((max(p.shape[-2:]) for p in matrices), default=width)
    return compute_type(model).itemsize * (3 * width + 4 * inner)


def scores_bytes(model: nn.Module, length: int) -> int:
    """Bytes of attention probabilities for each token of a row of `length`; only `eager` attention keeps them."""
    config = model.config.get_text_config()
    eager = config._attn_implementation == "eager"
    return 2 * 4 * config.num_attention_heads * length if eager else 0


def cache_bytes(model: nn.Module) -> int:
    """Bytes that the cache of a supported model takes for each token before anything is dropped."""
    return 2 * compute_type(model).itemsize * sum(block.kv_heads * block.head_dim for block in blocks(model))


def head_bytes(model: nn.Module) -> int:
    """Bytes of the output head in the type that is computed in, where it is stored in another and converted for a read.

    The largest weight of most models: 1.2 GB of Gemma-3's, whatever the batch.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.dtype == compute_type(model):
        return 0
    return head.weight.numel() * compute_type(model).itemsize


def batch_tokens(model: nn.Module, longest: int, kept: int = 0) -> int:
    """The number of tokens of a batch whose longest row has `longest`; more are no faster. See `affordable`."""
    return max(longest, min(TOKENS, affordable(model, longest, kept)))


def affordable(model: nn.Module, longest: int, kept: int = 0) -> int:
    """The number of tokens that a batch may have; kept: bytes of a cache for each token.

    Raises LlmoptError if not even one row of `longest` tokens fits into the available memory.
    """
    each = token_bytes(model) + scores_bytes(model, longest) + kept
    free = available() - 2 * CHUNK - head_bytes(model)
    if longest * each > free:
        raise LlmoptError(f"a request of {longest:,} tokens takes {longest * each / 1e9:.1f} GB to score, "
                          f"{max(free, 0) / 1e9:.1f} GB are available; shorter documents or more memory help")
    return int(SHARE * free) // each


def batches(lengths: list[int], rows: int, tokens: int) -> list[list[int]]:
    """Indices of requests, longest first, in batches of at most `rows` rows and, padded, `tokens` tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found: list[list[int]] = []
    for index in order:
        last = found[-1] if found else []
        if last and len(last) < rows and (len(last) + 1) * lengths[last[0]] <= tokens:
            last.append(index)
        else:
            found.append([index])
    return found
