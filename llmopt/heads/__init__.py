"""Head scores: how much each query head matters, or what it does."""
from llmopt.calibration.head_scores import load_scores, save_scores
from llmopt.heads.base import HeadScore, ProbeScore, plot
from llmopt.heads.divergence import Divergence
from llmopt.heads.gradient import Gradient
from llmopt.heads.hess import Hess
from llmopt.heads.influence import Influence
from llmopt.heads.lofit import Lofit
from llmopt.heads.need90 import Need90
from llmopt.heads.patching import Patching
from llmopt.heads.replay import Replay
from llmopt.heads.retrieval import Retrieval
from llmopt.heads.span import Span
from llmopt.heads.waad_fai import WaadFai

__all__ = ["Divergence", "Gradient", "HeadScore", "Hess", "Influence", "Lofit", "Need90", "Patching", "ProbeScore",
           "Replay", "Retrieval", "Span", "WaadFai", "load_scores", "plot", "save_scores"]
