"""llmopt: one recipe for head importance, KV cache, quantization, structural pruning and sparse prefill.

Notation in all files: B batch, H query heads, G KV heads, T tokens, D head_dim, F FFN channels, E hidden size,
L layers.

Words: a *block* is a decoder layer seen by its functions. Its *readers* (q, k, v, gate, up) take the residual stream
in, its *writers* (o, down) add to it. A *unit* is what pruning removes at once: an FFN channel, a KV group, a query
head, a sub-block, a block. A *group* is, of KV heads, the query heads that share one; of weights, those that read one
input; of columns, those that share a scale. A *target* is a weight to be quantized with its bits and group size. An
*entry* is one key and value in the cache with its position; entries are *kept* (flat, per head) or in the *tail* (the
newest tokens, dense). A *tile* is a run of rows, or of queries, computed together. A *stage* is the place of a step in
the order score, prune, transform, quant, runtime; also the hidden folder in which a checkpoint is written. A *link* is
a producer of channels (a norm, rows of a weight) with the readers of them. A *probe* is a question about a context.

Importing this costs nothing: each name below, and each folder, is imported when it is first used.
"""
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmopt.model.from_pretrained import extend_transformers

__version__: str        # of the package's metadata, read when it is asked for

if TYPE_CHECKING:
    from llmopt_evals.run import evaluate, run

    from llmopt import attention, experts, heads, kv, prune, quant, transform
    from llmopt.checkpoint.save import load, save
    from llmopt.checkpoint.verify import VerificationError
    from llmopt.errors import LlmoptError
    from llmopt.method import Method, Record
    from llmopt.parts import get, names, register
    from llmopt.run.compress import compress, dry_run
    from llmopt.run.report import Report
    from llmopt.runtime.attach import attached

_HOMES = {
    "LlmoptError": "llmopt.errors", "Method": "llmopt.method", "Record": "llmopt.method",
    "Report": "llmopt.run.report", "VerificationError": "llmopt.checkpoint.verify",
    "attached": "llmopt.runtime.attach", "compress": "llmopt.run.compress", "dry_run": "llmopt.run.compress",
    "evaluate": "llmopt_evals.run", "get": "llmopt.parts", "load": "llmopt.checkpoint.save", "names": "llmopt.parts",
    "register": "llmopt.parts", "save": "llmopt.checkpoint.save",
}

__all__ = ["LlmoptError", "Method", "Record", "Report", "VerificationError", "__version__", "attached", "attention",
           "compress", "dry_run", "evaluate", "experts", "get", "heads", "kv", "load", "names", "prune", "quant",
           "register", "run", "save", "transform"]

extend_transformers()       # plain from_pretrained now loads per-layer shapes and attaches runtime parts


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    fact = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):
        raise AttributeError(fact)
    from llmopt.parts import elsewhere

    raise AttributeError(fact + elsewhere(name, __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
