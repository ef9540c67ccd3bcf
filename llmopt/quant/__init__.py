"""Quantization of weights. One import line for each method: importing registers it."""
from llmopt.quant.gptq import GPTQ
from llmopt.quant.rtn import RTN

__all__ = ["GPTQ", "RTN"]
