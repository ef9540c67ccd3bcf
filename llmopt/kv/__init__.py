"""KV cache methods."""
from llmopt.kv.cam import CaM
from llmopt.kv.captured import Captured
from llmopt.kv.compactor import Compactor
from llmopt.kv.critical import Critical
from llmopt.kv.d2o import D2O
from llmopt.kv.dropkv import DropKV
from llmopt.kv.ems import EMS
from llmopt.kv.ems_merge import EMSMerge
from llmopt.kv.expected import Expected
from llmopt.kv.fisher import Fisher
from llmopt.kv.h2o import H2O
from llmopt.kv.keydiff import KeyDiff
from llmopt.kv.knorm import Knorm
from llmopt.kv.kvmerger import KVMerger
from llmopt.kv.kvzap import KVzap
from llmopt.kv.kvzip import KVzip
from llmopt.kv.leverage import Leverage
from llmopt.kv.noncausal import NonCausal
from llmopt.kv.quant import Quant
from llmopt.kv.random import Random
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.streaming import Streaming
from llmopt.kv.tova import TOVA

__all__ = ["CaM", "Captured", "Compactor", "Critical", "D2O", "DropKV", "EMS", "EMSMerge", "Expected", "Fisher", "H2O",
           "KVMerger", "KVzap", "KVzip", "KeyDiff", "Knorm", "Leverage", "NonCausal", "Quant", "Random", "SnapKV",
           "Streaming", "TOVA"]
