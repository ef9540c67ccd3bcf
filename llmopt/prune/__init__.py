"""Structural pruning: whole channels, KV groups, sub-blocks and blocks leave the model."""
from llmopt.prune.base import Pruner
from llmopt.prune.depth import Depth
from llmopt.prune.dimap import DIMAP
from llmopt.prune.ecoflap import ECoFLaP
from llmopt.prune.experts import ExpertPruner
from llmopt.prune.fisher import Fisher
from llmopt.prune.flap import FLAP
from llmopt.prune.fuse import Fuse
from llmopt.prune.heads import Heads
from llmopt.prune.heal import Heal
from llmopt.prune.magnitude import Magnitude
from llmopt.prune.measured import Measured
from llmopt.prune.modhifi import ModHiFi
from llmopt.prune.nvit import NViT
from llmopt.prune.obs import OBS
from llmopt.prune.pagcp import PAGCP
from llmopt.prune.plan import ByPlan
from llmopt.prune.taylor import Taylor
from llmopt.prune.tyr import Tyr
from llmopt.prune.wanda import Wanda

__all__ = ["DIMAP", "FLAP", "OBS", "PAGCP", "ByPlan", "Depth", "ECoFLaP", "ExpertPruner", "Fisher", "Fuse", "Heads",
           "Heal", "Magnitude", "Measured", "ModHiFi", "NViT", "Pruner", "Taylor", "Tyr", "Wanda"]
