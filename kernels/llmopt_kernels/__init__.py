"""Every operation llmopt needs beyond torch: its definition in torch, and faster versions with the same signature."""
from llmopt_kernels.dense import dense_attention, dense_visible
from llmopt_kernels.ragged import ragged_attention
from llmopt_kernels.reference import NONE, Ragged, Rule, attention, attention_weights, column_sums
from llmopt_kernels.rotary import rotate, unrotate
from llmopt_kernels.sparse import Pooled, Stripes, sparse_attention

__all__ = ["NONE", "Pooled", "Ragged", "Rule", "Stripes", "attention", "attention_weights", "column_sums",
           "dense_attention", "dense_visible", "ragged_attention", "rotate", "sparse_attention", "unrotate"]
