"""Quantization of weights. One import line for each method or solver: importing registers it."""
from llmopt.quant.autoround import AutoRound
from llmopt.quant.gptq import GPTQ
from llmopt.quant.hqq import HQQ
from llmopt.quant.rtn import RTN
from llmopt.quant.tune import Tune
from llmopt.quant.weights import Weights

__all__ = ["GPTQ", "HQQ", "RTN", "AutoRound", "Tune", "Weights"]
