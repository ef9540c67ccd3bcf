"""llmopt: one recipe for head importance, KV cache, quantization, structural pruning and sparse prefill.

Notation in all files: B batch, H query heads, G KV heads, T tokens, D head_dim, F FFN channels, E hidden size,
L layers.
"""
from llmopt import attention, heads, kv, prune, quant
from llmopt.checkpoint import load, save
from llmopt.method import LlmoptError, Method, Record, get, names, register
from llmopt.modeling import register_models
from llmopt.pipeline import Report, compress
from llmopt.runtime import attached
from llmopt.verify import VerificationError

register_models()       # plain AutoModelForCausalLM now loads per-layer shapes and attaches runtime parts

__all__ = ["LlmoptError", "Method", "Record", "Report", "VerificationError", "attached", "attention", "compress", "get",
           "heads", "kv", "load", "names", "prune", "quant", "register", "save"]
