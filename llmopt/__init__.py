"""llmopt: one recipe for head importance, KV cache, quantization, structural pruning and sparse prefill.

Notation in all files: B batch, H query heads, G KV heads, T tokens, D head_dim, F FFN channels, E hidden size,
L layers.
"""
from llmopt import attention, heads, kv, prune, quant, transform
from llmopt.checkpoint.save import load, save
from llmopt.checkpoint.verify import VerificationError
from llmopt.errors import LlmoptError
from llmopt.method import Method, Record
from llmopt.model.modeling import register_models
from llmopt.parts import get, names, register
from llmopt.run.pipeline import compress
from llmopt.run.report import Report
from llmopt.runtime.attach import attached

register_models()       # plain AutoModelForCausalLM now loads per-layer shapes and attaches runtime parts

__all__ = ["LlmoptError", "Method", "Record", "Report", "VerificationError", "attached", "attention", "compress", "get",
           "heads", "kv", "load", "names", "prune", "quant", "register", "save",
           "transform"]
