"""Head scores: how much each query head matters, or what it does."""
from llmopt.heads.base import HeadScore, load_scores, plot, save_scores
from llmopt.heads.gradient import Gradient
from llmopt.heads.span import Span

__all__ = ["Gradient", "HeadScore", "Span", "load_scores", "plot", "save_scores"]
