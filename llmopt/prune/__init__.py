"""Structural pruning: whole channels, KV groups, sub-blocks and blocks leave the model."""
from llmopt.prune.base import Pruner
from llmopt.prune.magnitude import Magnitude

__all__ = ["Magnitude", "Pruner"]
