"""What sparse prefill reads of the attention that there is: recall against density, many selectors on one dense run.

    recall of row i = sum of softmax weights of the keys that it reads = exp(lse over these keys - lse over all keys)
    density = pairs computed / causal pairs

The model runs densely; at every layer each selector is shown its queries, keys and values. Means over layers, heads and
rows. Selectors whose far keys are pooled have no recall in this sense.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmopt_kernels import Stripes, sparse_partial
from torch import Tensor, nn

from llmopt import runtime
from llmopt.attention.base import Selector, State
from llmopt.calibration.data import load
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError, naming
from llmopt.method import Method, Record, Run
from llmopt.model.loading import load_dense
from llmopt.parts import build
from llmopt.progress import Progress
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals.bench import answers
from llmopt_evals.entries import read
from llmopt_evals.world import speaks_world


@dataclass(frozen=True)
class Watch(Selector):
    """Reads everything, and notes what others would read. others: (method, its record); found: their figures."""

    name = "bench.watch"
    min_length: int = 0
    last: int = 0
    others: tuple[tuple[Selector, Record], ...] = ()
    found: tuple[list[tuple[Tensor, float]], ...] = ()

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        everything = Stripes(0, k.shape[1])
        dense, pairs = sparse_partial(q, k, state.values, everything, state.rule)
        for (method, record), found in zip(self.others, self.found, strict=True):
            own = State(state.layer, state.rule, state.values, state.offset, state.dropped, record,
                        state.shared.setdefault(id(method), {}))
            part, computed = sparse_partial(q, k, state.values, method.select(q, k, own), state.rule)
            found.append(((part.lse - dense.lse).exp().mean(), float((computed / pairs).mean())))
        return everything


@dataclass(frozen=True)
class Loaded:
    """A model with rows [T] of token ids, and the scores of heads that methods ask for."""

    model: nn.Module
    tokenizer: Any
    rows: list[Tensor]
    run: Run

    @classmethod
    def of(cls, name: str, data: DataSpec, methods: Sequence[Selector], progress: Progress,
           dtype: str = "float32") -> "Loaded":
        """A model by its name, and rows of a source of calibration data."""
        model, tokenizer = load_dense(ModelSpec(id=name, dtype=dtype))
        batches = load(data.of(name), model.config, tokenizer, Sampler(model, tokenizer))
        run = Run(batches=batches, tokenizer=tokenizer, progress=progress)
        for score in dict.fromkeys(method.heads for method in methods if getattr(method, "heads", None)):
            if score.startswith("heads."):
                build(score, {}).apply(model, run)
        rows = [ids[mask.bool()] for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"],
                                                                           strict=True)]
        return cls(model, tokenizer, rows, run)

    def texts(self, path: str | None, length: int, count: int) -> list[answers.Text]:
        """Texts with questions: of a file, or documents of the world where none is given."""
        if path is not None:
            limit = self.model.config.get_text_config().max_position_embeddings
            return [*answers.of_file(path, self.tokenizer, length, count, limit)]
        if not speaks_world(self.tokenizer):
            raise LlmoptError("--text FILE is needed: this model does not speak the embedded world's language")
        return [*answers.of_world(length, count)]


def selectors(words: Sequence[str]) -> list[Selector]:
    """The methods of entries of a recipe's `steps`; raises LlmoptError for others than selectors of sparse prefill."""
    found: list[Selector] = []
    for word in words:
        with naming(word):
            for name, fields in read(word):
                made: Method = build(name, fields)
                if not isinstance(made, Selector):
                    raise LlmoptError("a selector of sparse prefill expected (attention.*, but for attention.act)")
                found.append(made)
    return found


def measure(model: nn.Module, rows: Sequence[Tensor], methods: Sequence[Selector], run: Run) -> list[dict[str, Any]]:
    """{"method", "fields", "recall", "density"} of each, over rows [T] of token ids."""
    watch = Watch(others=tuple((method, method.plan(model, run)) for method in methods),
                  found=tuple([] for _ in methods))
    with runtime.attached(model, watch), torch.no_grad():
        for row in run.progress(list(rows), "texts"):
            model(row[None], use_cache=False)
    told = []
    for method, found in zip(methods, watch.found, strict=True):
        fields = method.to_dict()[method.name]
        recalls, densities = zip(*found, strict=True)
        told.append({"method": method.name, "fields": fields, "recall": float(torch.stack(recalls).mean()),
                     "density": sum(densities) / len(densities)})
    return told
