"""Transforms: edits of the weights that change no output, to make what follows easier."""
from llmopt.transform.awq import AWQ
from llmopt.transform.base import Transform
from llmopt.transform.fold_norms import FoldNorms
from llmopt.transform.rotate import Rotate
from llmopt.transform.smoothquant import SmoothQuant

__all__ = ["AWQ", "FoldNorms", "Rotate", "SmoothQuant", "Transform"]
