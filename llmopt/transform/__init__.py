"""Transforms: edits of the weights that change no output, to make what follows easier."""
from llmopt.transform.base import Transform
from llmopt.transform.fold_norms import FoldNorms
from llmopt.transform.rotate import Rotate

__all__ = ["FoldNorms", "Rotate", "Transform"]
