"""What acts while the model runs: attach and detach, the attention function, the cache."""
from llmopt.runtime.attach import (
    CacheMethod,
    PrefillMethod,
    RuntimeMethod,
    StoreMethod,
    attach,
    attach_from_config,
    attached,
    attachment,
    detach,
    frozen,
    has_eviction,
    keeps_states,
    new_cache,
    runtime_config,
)
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment

__all__ = ["Attachment", "CacheMethod", "LlmoptCache", "PrefillMethod", "RuntimeMethod", "StoreMethod", "attach",
           "attach_from_config", "attached", "attachment", "detach", "frozen", "has_eviction", "keeps_states",
           "new_cache", "runtime_config"]
