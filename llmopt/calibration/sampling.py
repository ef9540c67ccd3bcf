"""Calibration rows sampled from the model itself: no text, no network, any vocabulary.

Plain ancestral sampling, temperature 1 without top-k or top-p: rows then follow the model's own distribution, which is
that of its training text as far as it has learned it; sharper settings leave out the rare inputs that calibration must
see, and repeat themselves. The end of a text does not end a row: the model goes on with its next text. Each second row
is a conversation through the chat template, where there is one, of which the model writes both sides.

Row i draws its tokens by the inverse of the distribution function, u uniform from (seed, i) and place: the token is
min{k: sum_{j<=k} p_j > u}. So a row depends neither on its batch nor on the number of threads, up to the rounding of p.
"""
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmopt.calibration.conversation import Conversation, conversation_of
from llmopt.errors import LlmoptError
from llmopt.files import cache
from llmopt.files.checks import refusals
from llmopt.model.computing import compute_type, computing
from llmopt.model.loaded import evaluating
from llmopt.progress import Progress, silent
from llmopt.runtime.rehearsal import cache_bytes_per_token
from llmopt.scale.available import available
from llmopt.scale.processes import Ranks
from llmopt.specs import DataSpec

LOG = logging.getLogger(__name__)
LENGTH = 256            # tokens of a row by default: half of other sources', as each costs a forward of its own
ROWS = 64               # at once: on two cores a step for 64 rows takes less than twice that for 16
VERSION = 1             # of how rows are drawn; another one finds none of the kept rows
KIND = "rows"           # of the entries in the user's cache folder
SEPARATOR = "<|endoftext|>"


@dataclass
class Row:
    """One row while it is sampled. forced: tokens to come whatever the model says; ends: tokens that end a turn."""

    forced: list[int]
    talk: Conversation | None = None
    ends: frozenset[int] = frozenset()
    asked: bool = True                  # the turn is the user's
    tokens: list[int] = field(default_factory=list)

    def add(self, drawn: int) -> int:
        """The token that really follows, for which the model's draw stands unless another is forced."""
        if self.talk and not self.forced and drawn in self.ends:
            self.forced = list(self.talk.to_assistant if self.asked else self.talk.to_user)
            self.asked = not self.asked
        self.tokens.append(self.forced.pop(0) if self.forced else drawn)
        return self.tokens[-1]


@dataclass
class Sampler:
    """Draws rows from a model whose weights are in memory; rank 0 samples, the other processes are told."""

    model: nn.Module
    tokenizer: Any = None
    ranks: Ranks = Ranks()              # noqa: RUF009  frozen
    progress: Progress = silent

    @cached_property
    def talk(self) -> Conversation | None:
        """What makes a conversation of a row."""
        return conversation_of(self.tokenizer)

    @cached_property
    def start(self) -> int | None:
        """The token that plain rows begin with; None: any."""
        return start_of(self.model.config.get_text_config(), self.tokenizer)

    @property
    def count(self) -> int:
        """Tokens to draw from: rows of the embedding beyond the tokenizer's tokens only fill it up."""
        size = self.model.config.get_text_config().vocab_size
        return size if self.tokenizer is None else min(size, len(self.tokenizer))

    @property
    def ends(self) -> frozenset[int]:
        """The model's own end-of-text tokens."""
        named = [getattr(holder, "eos_token_id", None) for holder in
                 (self.model.config.get_text_config(), self.model.generation_config, self.tokenizer)]
        return frozenset(token for name in named for token in (name if isinstance(name, (list, tuple)) else [name])
                         if token is not None)

    def rows(self, spec: DataSpec, length: int, first: int = 0) -> list[list[int]]:
        """Rows first .. first + spec.samples - 1 of `length` tokens, kept ones if there are."""
        with torch.no_grad(), evaluating(self.model), computing(self.model):
            return self.ranks.agree(self.own_rows(spec, length, first) if self.ranks.is_main else None)

    def own_rows(self, spec: DataSpec, length: int, first: int) -> list[list[int]]:
        """These rows in this process."""
        key = self.key(spec, length, first)
        found = kept(key)
        if found is None:
            self.check()
            found = self.sample(range(first, first + spec.samples), length, spec.seed)
            cache.write(KIND, key, found)
        return found

    def check(self) -> None:
        """Raise LlmoptError for a model whose weights are elsewhere: each token of a row takes them all."""
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise LlmoptError("sampling rows takes the whole model in memory, and its weights are elsewhere; give "
                              "data: {name: text, path: FILE}")

    def key(self, spec: DataSpec, length: int, first: int) -> dict[str, Any]:
        """All that the rows depend on."""
        talk = self.talk
        pieces = [talk.opening, talk.to_assistant, talk.to_user, sorted(talk.ends)] if talk else []
        return {"version": VERSION, "model": fingerprint(self.model), "computed": str(compute_type(self.model)),
                "tokens": self.count, "start": self.start, "ends": sorted(self.ends),
                "talk": [list(piece) for piece in pieces], "samples": spec.samples, "length": length, "first": first,
                "seed": spec.seed}

    def sample(self, numbers: range, length: int, seed: int) -> list[list[int]]:
        """The rows of these numbers, drawn now."""
        width = self.width(length)
        parts = [numbers[i:i + width] for i in range(0, len(numbers), width)]
        steps = iter(self.progress(range(len(parts) * (length - 1)), "sampling calibration rows"))
        found = [row for part in parts for row in self.draw(part, noise_of(seed, part, length), self.memory(), steps)]
        next(steps, None)               # lets the bar end
        return found

    def width(self, length: int) -> int:
        """How many rows are sampled at once: ROWS, or what a quarter of the free memory can hold the caches of."""
        row = length * cache_bytes_per_token(self.model) + 16 * self.model.config.get_text_config().vocab_size
        return int(min(ROWS, max(1, available() // 4 // row)))

    def memory(self) -> DynamicCache:
        """An empty KV cache of the model."""
        return DynamicCache(config=self.model.config)

    def draw(self, numbers: range, noise: Tensor, memory: DynamicCache, steps: Iterator) -> list[list[int]]:
        """Rows of these numbers, sampled together from their noise [B, T]; one of `steps` is taken for each token."""
        rows = [self._row(number, u) for number, u in zip(numbers, noise[:, 0].tolist(), strict=True)]
        tokens = [row.add(-1) for row in rows]
        for place in range(1, noise.shape[1]):
            next(steps)
            logits = self.step(tokens, memory)
            drawn = drawn_from(logits[:, :self.count], noise[:, place].to(logits.device))
            tokens = [row.add(token) for row, token in zip(rows, drawn, strict=True)]
        return [row.tokens for row in rows]

    def step(self, tokens: list[int], memory: DynamicCache) -> Tensor:
        """Logits [B, V] behind one more token of each row."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        with refusals("no rows can be sampled from this model, give it a text (data: {name: text, path: FILE})"):
            return self.model(input_ids=ids, past_key_values=memory, use_cache=True).logits[:, -1]

    def _row(self, number: int, u: float) -> Row:
        """The beginning of a row: odd ones are conversations."""
        talk = self.talk if number % 2 else None
        if talk:
            return Row(list(talk.opening) or [self._first(u)], talk, talk.ends | self.ends)
        return Row([self._first(u)])

    def _first(self, u: float) -> int:
        start = self.start
        return int(u * self.count) if start is None else start


def kept(key: dict[str, Any]) -> list[list[int]] | None:
    """The rows with this key, if they were sampled before."""
    entry = cache.read(KIND, key)
    if entry is None:
        return None
    LOG.info("calibration rows: sampled from this model on %s, kept in %s", entry["date"], cache.folder(KIND))
    return entry["part"]


def drawn_from(logits: Tensor, u: Tensor) -> list[int]:
    """One token for each row of logits [B, V], by the inverse of its distribution function at u [B] in [0, 1)."""
    total = torch.softmax(logits.float(), -1).double().cumsum(-1)
    if not bool(total[:, -1].isfinite().all()):
        raise LlmoptError("the model computes NaN from tokens that it has drawn itself; its config or its weights are "
                          "damaged")
    found = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1).tolist()


def start_of(config: Any, tokenizer: Any) -> int | None:
    """The token in front of a text, from which a model begins one of its own: BOS where the tokenizer puts it there.

    Else the separator of texts by its usual name: the BOS of models without a habit of it (SmolLM2, Qwen) opens a turn
    of a conversation. Else BOS or EOS, whatever there is.
    """
    named = [getattr(holder, f"{kind}_token_id", None) for kind in ("bos", "eos") for holder in (tokenizer, config)]
    if tokenizer is not None:
        bos, text = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        separator = tokenizer.get_vocab().get(SEPARATOR)
        if not (bos is not None and text[:1] == [bos]) and separator is not None:
            named.insert(0, separator)
    plain = [token[0] if isinstance(token, (list, tuple)) and token else token for token in named]
    return next((token for token in plain if isinstance(token, int) and 0 <= token < config.vocab_size), None)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's config and weights."""
    said = model.config.to_dict()
    said = {name: said[name] for name in sorted(said) if name not in ("_name_or_path", "transformers_version")}
    found = hashlib.sha256(repr(said).encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def noise_of(seed: int, numbers: range, length: int) -> Tensor:
    """Uniform draws [B, T] in [0, 1); each row's depend on the seed and its number alone."""
    mixed = [int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big") for number in numbers]
    return torch.stack([torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(one))
                        for one in mixed])
