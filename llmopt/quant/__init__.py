"""Quantization of weights. One import line for each method or solver: importing registers it."""
from llmopt.quant.gptq import GPTQ
from llmopt.quant.rtn import RTN
from llmopt.quant.weights import Weights

__all__ = ["GPTQ", "RTN", "Weights"]
from llmopt.quant import autoround
