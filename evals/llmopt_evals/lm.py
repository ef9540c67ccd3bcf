"""The lm-eval model class `llmopt`: `hf`, with the cache methods of a checkpoint really in force.

A request's context is prefilled and compressed by the attached methods; its last token is then read once more, and the
continuation after it, on what was kept: otherwise one-word answers would come out of the prefill and suffer nothing.
The first `ask` of a world text ends the context, so that agnostic questions are asked of one finished cache. A rolling
window (perplexity) scores its first half while prefilling it, compresses, then scores the second half: every token
counts once, and without a method all figures equal those of `hf` (log-softmax in float32, where `hf` takes the model's
own type). Only the tokens that are scored get logits (readout.py); batches are made by their tokens (batching.py).
"""
import hashlib
import json
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llmopt import runtime
from llmopt.errors import LlmoptError
from llmopt.model.computing import compute_type
from llmopt.scale.processes import Ranks
from llmopt_evals.batching import affordable, batch_tokens, batches, cache_bytes
from llmopt_evals.readout import Readout
from llmopt_evals.world import speaks_world, split_context
from llmopt_evals.world.words import ID

Request = tuple[tuple[str, str] | None, list[int], list[int]]      # strings, context ids, continuation ids
Score = tuple[float, bool]                                         # log-likelihood, greedy
CONTEXT = "compressed_context"          # key of a task's document: the part of its context that may be compressed
OWNER = "llmopt: whose answers these are"


@register_model("llmopt")
class LlmoptLM(HFLM):
    """HFLM whose log-likelihoods pass through the compressed cache of the attached methods."""

    _rolling = False
    _longest = 0                                # tokens of the longest request that is generated at the moment
    _contexts: list[str | None] = []            # of the requests at hand: what of each may be compressed; None: all

    def __init__(self, *args, ranks: Ranks = Ranks(), **kwargs):        # noqa: B008  frozen
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.readout = Readout(self.model, self.softmax_dtype or torch.float32) if self.backend == "causal" else None
        if own := vars(self).get("accelerator"):                        # what HFLM does on several GPUs only
            self._rank, self._world_size = own.process_index, own.num_processes

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's store of answers (`--use_cache`) if they are this model's; its keys do not tell models apart.

        Raises LlmoptError for a store of another model, or of one that has left no name.
        """
        if (store := cache_hook.dbdict) is not None:
            own = fingerprint(self)
            if store.get(OWNER, own if not len(store) else None) != own:
                raise LlmoptError("--use_cache: that file holds the answers of another model, tokenizer or method; "
                                  "give each model a file of its own")
            store[OWNER] = own
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Score]:
        self._contexts = [r.doc.get(CONTEXT) and up_to(r.doc[CONTEXT], r.args[0]) if isinstance(r.doc, dict) else None
                          for r in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._contexts = []

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rolling = False

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        """What --batch_size auto means: as many of the longest requests as the memory holds.

        lm-eval tries the largest batch out until one fits, which on a CPU ends the process.
        """
        if self._rolling:
            return self.max_batch_size
        return min(self.max_batch_size, self._rows())

    def _rows(self) -> int:
        """Rows of the longest request, its cache beside it, that the memory holds; LlmoptError if it holds none."""
        longest, config = self._longest or self.max_length, self.model.config.get_text_config()
        cached = 2 * compute_type(self.model).itemsize * config.num_hidden_layers * config.hidden_size     # at most
        return max(1, affordable(self.model, longest, cached) // longest)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[Score]:
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        quiet = disable_tqdm or self._rolling
        with torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None):
            if not runtime.runtime_config(self.model)["steps"]:
                return self._of_all(self._dense(self.ranks.share(requests), quiet))
            scores = self._compressed(requests, quiet)
        return [score for _, score in sorted(self._of_all(list(scores.items())))]

    def _dense(self, requests: list[Request], quiet: bool) -> list[Score]:
        """Scores of a model without methods; lm-eval's own loop mixes up requests that read the same tokens."""
        rows = [((context + continuation)[-(self.max_length + 1):], len(continuation))
                for _, context, continuation in requests]
        lengths, scores = [len(ids) - 1 for ids, _ in rows], {}
        tokens = batch_tokens(self.model, max(lengths, default=0))
        most = self.max_batch_size if self.batch_size == "auto" else int(self.batch_size)
        for batch in tqdm(batches(lengths, most, tokens), disable=quiet, desc="batches"):
            scores |= zip(batch, self._score_batch([rows[index] for index in batch]), strict=True)
        return [scores[index] for index in range(len(rows))]

    def _score_batch(self, rows: list[tuple[list[int], int]]) -> list[Score]:
        """Scores of the last `count` tokens of each (ids, count); padding stands on the right, where nobody looks."""
        inputs = [torch.tensor(ids[:-1], device=self.device) for ids, _ in rows]
        states, _ = self.readout.states(pad_sequence(inputs, batch_first=True), use_cache=False)
        wanted = torch.cat([row[len(ids) - count:len(ids)]
                            for row, ids, (_, count) in zip(states, inputs, rows, strict=True)])
        return self._read(wanted, [ids[-count:] for ids, count in rows])

    def _read(self, states: Tensor, targets: list[list[int]]) -> list[Score]:
        """Sum of the log-probabilities of each list of targets, and whether each token was the most likely one."""
        flat = torch.tensor([token for row in targets for token in row], device=self.device)
        parts = (part.split([len(row) for row in targets]) for part in self.readout.read(states, flat))
        return [(logp.sum().item(), bool(hit.all())) for logp, hit in zip(*parts, strict=True)]

    def _compressed(self, requests: list[Request], quiet: bool) -> dict[int, Score]:
        """Scores by index of this process' share; requests of one context ask the same compressed cache."""
        groups = defaultdict(list)
        contexts = self._contexts or [None] * len(requests)
        for index, (request, context) in enumerate(zip(requests, contexts, strict=True)):
            prefix, tail = self._cut(request[1], request[2], context)
            groups[tuple(prefix)].append((index, tail, len(request[2])))
        batch_tokens(self.model, max((len(prefix) for prefix in groups), default=0), cache_bytes(self.model))
        own, scores = self.ranks.share(list(groups.items())), {}
        for prefix, members in tqdm(own, disable=quiet, desc="compressed contexts"):
            scores |= self._score_group(list(prefix), members)
        return scores

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        own = self.ranks.share(requests)
        lengths = (len(self.tok_encode(r.args[0])) + r.args[1].get("max_gen_toks", self.max_gen_toks) for r in own)
        self._longest, asked = min(max(lengths, default=1), self.max_length), self.batch_size_per_gpu
        try:
            if asked != "auto" and self.backend == "causal":
                self.batch_size_per_gpu = min(asked, self._rows())
            return self._of_all(super().generate_until(own, disable_tqdm))
        finally:
            self._longest, self.batch_size_per_gpu = 0, asked

    def _of_all(self, own: list) -> list:
        return [one for part in self.ranks.gather(own) for one in part]

    def _cut(self, context: list[int], continuation: list[int], text: str | None) -> tuple[list[int], list[int]]:
        """(what is prefilled and compressed, what is scored on the kept part).

        text: the part of the context that is compressed, where the task says so.
        """
        whole = (context + continuation)[-(self.max_length + 1):]
        if self._rolling:
            half = max(1, len(whole) // 2)
            return whole[:half], whole[half:]
        dropped = len(context) + len(continuation) - len(whole)
        shown, prefix, asked = whole[:-len(continuation)], whole[:-len(continuation)], []
        if text is not None:
            cut = max(common(context, self.tok_encode(text)) - dropped, 0)
            prefix, asked = shown[:cut], shown[cut:]
        elif self._speaks_world():
            prefix, asked = split_context(shown, ID["ask"])
        if not prefix:                                  # cut off on the left up to the question itself
            prefix, asked = shown, []
        return prefix, asked + continuation

    def _speaks_world(self) -> bool:
        if not hasattr(self, "_world"):
            self._world = speaks_world(self.tokenizer)
        return self._world

    def _score_group(self, prefix: list[int], members: list[tuple[int, list[int], int]]):
        """(index, score) of every tail asked after one prefix, each from the same compressed cache.

        The prefix's last token is read on what was kept; by layers with states, which take none back, only there.
        """
        aside = runtime.keeps_states(self.model)
        evicts = not self._rolling and runtime.has_eviction(self.model) and len(prefix) > aside
        aside, again = aside and evicts, prefix[-1:] if evicts else []
        inside, filled = self.readout.states(torch.tensor([prefix[:-1] if aside else prefix], device=self.device),
                                             use_cache=True)
        cache = filled.past_key_values.without_last() if evicts and not aside else filled.past_key_values
        for index, tail, count in members:
            states = torch.cat([inside[0], self._continue(cache, [*again, *tail[:-1]], inside)])
            score, = self._read(states[-count:], [[*prefix[1:], *tail][-count:]])
            yield index, score

    def _continue(self, cache, ids: list[int], inside: Tensor) -> Tensor:
        """States [len(ids), C] of `ids`, read on a frozen copy of the cache; inside: those of the prefix."""
        if not ids:
            return inside[0, :0]
        with runtime.frozen(self.model):
            return self.readout.states(torch.tensor([ids], device=self.device), past_key_values=cache.fork())[0][0]

    def get_model_info(self) -> dict:
        return super().get_model_info() | {"llmopt": runtime.runtime_config(self.model)}


def up_to(part: str, context: str) -> str:
    """The context up to the end of `part`, which a chat template and few-shot examples may stand in front of.

    Templates take away the space around a message. Raises LlmoptError where they have changed more than that.
    """
    if context.startswith(part):
        return part
    place = context.rfind(part.strip())
    if place < 0:
        raise LlmoptError("the chat template changes the text whose cache is to be compressed; ask without it")
    return context[:place + len(part.strip())]


def common(one: list[int], other: list[int]) -> int:
    """The number of tokens that two lists begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def fingerprint(lm: HFLM) -> str:
    """SHA-256 of all that an answer depends on: weights, methods in force, tokenizer, types and lengths."""
    settings = [runtime.runtime_config(lm.model), lm.tokenizer.get_vocab(), str(lm.model.config.to_dict()),
                lm.max_length, lm.add_bos_token, lm.prefix_token_id, str(lm.softmax_dtype),
                str(lm.mixed_precision_dtype), str(getattr(lm, "pretrained", ""))]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in lm.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:                          # offloaded ones: the model's name has to do
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
