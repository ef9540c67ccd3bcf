"""Sparse prefill methods."""
from llmopt.attention.a_shape import AShape

__all__ = ["AShape"]
