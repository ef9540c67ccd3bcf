"""Every operation llmopt needs beyond torch: its definition in torch, and faster versions with the same signature."""
from llmopt_kernels.dense import dense_attention, dense_visible
from llmopt_kernels.few import few_queries
from llmopt_kernels.narrow import Int4, Int8
from llmopt_kernels.partial import Partial, merged, ragged_partial, sunk
from llmopt_kernels.planes import Planes
from llmopt_kernels.product import chosen, fixed, laid_out, quant_matmul
from llmopt_kernels.ragged import ragged_attention
from llmopt_kernels.reference import (
    NONE,
    Packed,
    Ragged,
    Rule,
    attention,
    attention_weights,
    column_max,
    column_sums,
    dense,
    joined,
)
from llmopt_kernels.rotary import rotate, unrotate
from llmopt_kernels.sparse import Pooled, Stripes, sparse_attention, sparse_partial
from llmopt_kernels.words import Codes, Words
from llmopt_kernels.worth import gain

__all__ = ["NONE", "Codes", "Int4", "Int8", "Packed", "Partial", "Planes", "Pooled", "Ragged", "Rule", "Stripes",
           "Words", "attention", "attention_weights", "chosen", "column_max", "column_sums", "dense", "dense_attention",
           "dense_visible", "few_queries", "fixed", "gain", "joined", "laid_out", "merged", "quant_matmul",
           "ragged_attention", "ragged_partial", "rotate", "sparse_attention", "sparse_partial", "sunk", "unrotate"]
