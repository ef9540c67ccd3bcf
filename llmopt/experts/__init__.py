"""Methods that let a token go to fewer experts than its router chose."""
from llmopt.experts.skip import Skip
from llmopt.experts.top_k import TopK

__all__ = ["Skip", "TopK"]
