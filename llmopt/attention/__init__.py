"""Methods that act on attention: sparse prefill, calibration."""
from llmopt.attention.a_shape import AShape
from llmopt.attention.act import Act
from llmopt.attention.anchor import Anchor
from llmopt.attention.block_topk import BlockTopK
from llmopt.attention.core_context import CoreContext
from llmopt.attention.flash_prefill import FlashPrefill
from llmopt.attention.flexprefill import FlexPrefill
from llmopt.attention.local_heads import LocalHeads
from llmopt.attention.neighborhood import Neighborhood
from llmopt.attention.reuse import Reuse
from llmopt.attention.s2 import ShiftedGroups
from llmopt.attention.sparge import Sparge
from llmopt.attention.stem import Stem
from llmopt.attention.tri_shape import TriShape
from llmopt.attention.vertical_slash import VerticalSlash
from llmopt.attention.xattention import XAttention

__all__ = ["AShape", "Act", "Anchor", "BlockTopK", "CoreContext", "FlashPrefill", "FlexPrefill", "LocalHeads",
           "Neighborhood", "Reuse", "ShiftedGroups", "Sparge", "Stem", "TriShape", "VerticalSlash", "XAttention"]
