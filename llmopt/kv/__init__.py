"""KV cache methods."""
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.streaming import Streaming

__all__ = ["SnapKV", "Streaming"]
