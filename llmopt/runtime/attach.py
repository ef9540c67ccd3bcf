"""What is in force while the model runs: methods that act then, attach and detach.

An attached model behaves as before (`generate`, `model(ids, use_cache=True)`); its attention modules call `llmopt`
instead of SDPA, its caches are `LlmoptCache`, and after each multi-token forward the attached kv method compresses.
"""
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmopt.errors import LlmoptError, naming
from llmopt.files.json_shapes import check_shape
from llmopt.method import Method, Record, Run
from llmopt.model.modeling import tensors_below
from llmopt.parts import build
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import Entries
from llmopt.runtime.compression import ATTENTION, EVICTOR, STORE, Packing
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.interface import KEY
from llmopt.runtime.prompt import Attended, Prompt

__all__ = ["AdjustMethod", "Attachment", "CacheMethod", "LlmoptCache", "PrefillMethod", "RuntimeMethod", "StoreMethod",
           "attach", "attach_from_config", "attached", "attachment", "detach", "frozen", "has_eviction",
           "keeps_states", "new_cache", "runtime_config"]


CONFIG = {"steps?": [{"method": {str: {str: object}}, "meta": {str: object}}], "tensors?": {str: object}, str: object}


class RuntimeMethod(Method):
    """A method that acts while the model runs; at most one for each place is attached."""

    stage = "runtime"
    level = "run time"
    place: ClassVar[str]
    adjusts: ClassVar[bool] = False

    @property
    def needs_whole(self) -> bool:
        return self.needs_data            # a plan made from data runs the model

    def plan(self, model: nn.Module, run: Run) -> Record:
        """Decide once, from head scores or calibration data: a record of plain JSON and small tensors."""
        return Record()

    def apply(self, model: nn.Module, run: Run) -> Record:
        record = self.plan(model, run)
        attach(model, self, record)
        return record

    def hooks(self, live: Attachment) -> list[RemovableHandle]:
        """Hooks of its own in the model's modules, which go when it is detached."""
        return []

    def check_record(self, model: nn.Module, record: Record) -> None:
        """Raise LlmoptError unless a record has the form that `plan` gives it and fits the model; it may be forged.

        Of a record in llmopt.json the tensors are not there, and the model is a skeleton without weights.
        """
        self.check_meta(record.meta)

    def restore(self, model: nn.Module, record: Record) -> None:
        self.check_record(model, record)
        attach(model, self, record)


class CacheMethod(RuntimeMethod):
    """A method that makes the cache smaller after a forward.

    layer_by_layer: it needs no other layer to decide on one, so each is made smaller as soon as its attention is
    computed, and a prefill never holds more than one layer in full. replays: the context is read again before it is
    made smaller, so the cache keeps its token ids and no query of the first reading. reads_ids: it keeps the ids in any
    case. hidden: what `condense` makes of the attention modules' inputs is kept beside the queries, of all tokens since
    the last compression; `queries` then says None, or 0 for none of them.
    """

    place = EVICTOR
    every: int | None
    layer_by_layer: bool = False
    replays: ClassVar[bool] = False
    reads_ids: bool = False
    hidden: bool = False

    def queries(self) -> int | None:
        """The number of last queries to keep in `layer.queries`; None: all since the last compression."""
        return 0

    def condense(self, hidden: Tensor, index: int, record: Record) -> Tensor:
        """What is kept of hidden [B, T, E], read by the attention of layer `index`: [B, T, N], all of it by default."""
        return hidden

    @abstractmethod
    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        """Drop entries of these layers of `cache` in place. live.rules[l] tells how layer l attends."""


class StoreMethod(RuntimeMethod):
    """A method that keeps what is left of the cache in another form than tensors of the model's type.

    It acts after every forward of several tokens, after the evictor, and every so many tokens of decoding.
    """

    place = STORE
    every: int | None

    @abstractmethod
    def pack(self, entries: Entries, packing: Packing) -> Entries:
        """One batch row of one layer whose keys and values, [G, T, D], are `llmopt_kernels.Packed`; nothing dropped.

        Entries that were packed before come as tensors again, with the columns they carry; that of the name `SOURCE`
        tells where they lie in `packing.before`, so that their codes need not be made a second time.
        """


class PrefillMethod(RuntimeMethod):
    """A method that computes attention from fewer pairs: of prompts, or, where it `decodes`, of single tokens."""

    place = ATTENTION
    decodes: bool = False

    @abstractmethod
    def attention(self, prompt: Prompt, live: Attachment) -> Tensor:
        """Attention of the queries over what the layer holds, [B, H, T, D]; single tokens come with a cache alone."""


class AdjustMethod(RuntimeMethod):
    """A method that adjusts what dense attention gives, of prompts and of single tokens alike, frozen or not."""

    place = ATTENTION
    adjusts: ClassVar = True

    @abstractmethod
    def adjust(self, out: Tensor, at: Attended, live: Attachment) -> Tensor:
        """The layer's output [B, H, T, D] instead of `out`, before the kv method drops any of what was read."""


def attachment(model: nn.Module) -> Attachment | None:
    """The attachment of `model`; None if there is none."""
    return model.__dict__.get(KEY)


def attach(model: nn.Module, method: RuntimeMethod, record: Record | None = None) -> None:
    """Put `method` in force; a second one for the same place is refused."""
    (attachment(model) or Attachment(model)).add(method, record or Record())


def detach(model: nn.Module) -> None:
    """Take off all that is attached; the model is again as it was, bit by bit."""
    live = attachment(model)
    if live is not None:
        live.switch_off()


@contextmanager
def attached(model: nn.Module, *methods: RuntimeMethod, run: Run | None = None) -> Iterator[nn.Module]:
    """`with attached(model, llmopt.kv.SnapKV(budget=256)): ...`; afterwards the model is as before."""
    live = attachment(model)
    before = dict(live.parts) if live else {}
    try:
        for method in methods:
            method.apply(model, run or Run())
        yield model
    finally:
        live = attachment(model)
        if live is not None and before:
            live.keep(before)
        elif live is not None:
            live.switch_off()


@contextmanager
def frozen(model: nn.Module, recording: bool = False) -> Iterator[None]:
    """Inside, nothing is compressed in this thread and new tokens attend densely to what the cache holds.

    recording: layers keep the queries of these tokens, as many as the attached kv method asks for.
    """
    live = attachment(model)
    if live is None:
        yield
        return
    before = live.now.frozen, live.now.recording
    live.now.frozen, live.now.recording = True, recording
    try:
        yield
    finally:
        live.now.frozen, live.now.recording = before


def new_cache(model: nn.Module) -> LlmoptCache:
    """An empty cache for a model with attached methods."""
    live = attachment(model)
    if live is None:
        raise LlmoptError("nothing is attached to this model")
    return live.new_cache()


def has_eviction(model: nn.Module) -> bool:
    """True if an attached method changes what the cache holds, by dropping entries or by packing them."""
    live = attachment(model)
    return live is not None and any(live.method(place) is not None for place in (EVICTOR, STORE))


def keeps_states(model: nn.Module) -> bool:
    """True if layers keep states beside keys and values, so that a cache cannot take its last token back."""
    live = attachment(model)
    return live is not None and any(live.states or ())


def runtime_config(model: nn.Module) -> dict[str, Any]:
    """The entry `llmopt` of config.json: the attached methods.

    {"steps": [{"method", "meta"}], "tensors": {"<step>.<name>": {"shape", "dtype"}}}; no tensors, no such key. The
    tensors themselves are the model's buffers `llmopt.<step>.<name>`.
    """
    live = attachment(model)
    if live is None:
        return {"steps": []}
    config: dict[str, Any] = {"steps": [{"method": method.to_dict(), "meta": meta}
                                        for method, meta in live.parts.values()]}
    tensors = tensors_below(model)
    if tensors:
        config["tensors"] = {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
                             for name, t in tensors.items()}
    return config


def attach_from_config(model: nn.Module) -> None:
    """Attach what `model.config.llmopt` describes, with the tensors among its buffers; nothing if that is done.

    Raises LlmoptError naming the step whose method, fields or record are not what llmopt writes for this model.
    """
    if attachment(model) is not None:
        return
    config = model.config.to_dict().get("llmopt") or {}
    methods = methods_of(config, lambda step: tensors_below(model, step))
    missing = config.get("tensors", {}).keys() - tensors_below(model).keys()
    if missing:
        raise LlmoptError(f"the tensor llmopt.{min(missing)} is missing; load the model through AutoModelForCausalLM "
                          "after `import llmopt`")
    for step, (method, record) in enumerate(methods):
        with naming(f"config.json: llmopt.steps.{step}"):
            method.restore(model, record)


def methods_of(config: dict[str, Any],
               tensors_of: Callable[[str], dict[str, Tensor]]) -> list[tuple[RuntimeMethod, Record]]:
    """What `runtime_config` has written: every method with its record. tensors_of: those of a step, by name."""
    check_shape(config, CONFIG, "config.json: llmopt")
    found = []
    for step, entry in enumerate(config.get("steps", [])):
        with naming(f"config.json: llmopt.steps.{step}"):
            found.append((_runtime_method(entry["method"]), Record(entry["meta"], tensors_of(str(step)))))
    return found


def _runtime_method(entry: dict[str, dict[str, Any]]) -> RuntimeMethod:
    """The method of {name: fields}; raises LlmoptError for none, several, or one that does not act at run time."""
    if len(entry) != 1:
        raise LlmoptError(f"one {{name: fields}} expected, {len(entry)} given")
    (name, given), = entry.items()
    method = build(name, given)
    if not isinstance(method, RuntimeMethod):
        raise LlmoptError(f"{name} does not act while the model runs")
    return method
