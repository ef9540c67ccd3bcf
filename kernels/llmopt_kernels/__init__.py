"""Every operation llmopt needs beyond torch: its definition in torch, and faster versions with the same signature."""
from llmopt_kernels.dense import dense_attention, dense_visible
from llmopt_kernels.reference import (
    NONE,
    Ragged,
    Rule,
    Stripes,
    attention,
    attention_weights,
    column_sums,
    ragged_attention,
    sparse_attention,
)

__all__ = ["NONE", "Ragged", "Rule", "Stripes", "attention", "attention_weights", "column_sums", "dense_attention",
           "dense_visible", "ragged_attention", "sparse_attention"]
