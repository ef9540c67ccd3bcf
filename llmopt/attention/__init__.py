"""Methods that act on attention: sparse prefill, calibration."""
from llmopt.attention.a_shape import AShape
from llmopt.attention.act import Act

__all__ = ["AShape", "Act"]
