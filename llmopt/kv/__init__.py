"""KV cache methods."""
from llmopt.kv.captured import Captured
from llmopt.kv.expected import Expected
from llmopt.kv.kvzap import KVzap
from llmopt.kv.kvzip import KVzip
from llmopt.kv.quant import Quant
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.streaming import Streaming

__all__ = ["Captured", "Expected", "KVzap", "KVzip", "Quant", "SnapKV", "Streaming"]
