"""The lm-eval model class `llmopt`: `hf`, with the cache methods of a checkpoint really in force.

A request's context is prefilled and compressed by the attached methods; its last token is then read once more, and the
continuation after it, on what was kept: otherwise one-word answers would come out of the prefill and suffer nothing.
The first `ask` of a world text ends the context, so that agnostic questions are asked of one finished cache. A rolling
window (perplexity) scores its first half while prefilling it, compresses, then scores the second half: every token
counts once, and without a method all figures equal those of `hf`.
"""
from collections import defaultdict

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from llmopt import runtime
from llmopt.scale.processes import Ranks
from llmopt_evals.world import speaks_world, split_context
from llmopt_evals.world.words import ID

Request = tuple[tuple[str, str] | None, list[int], list[int]]      # strings, context ids, continuation ids
Score = tuple[float, bool]                                         # log-likelihood, greedy


@register_model("llmopt")
class LlmoptLM(HFLM):
    """HFLM whose log-likelihoods pass through the compressed cache of the attached methods."""

    _rolling = False

    def __init__(self, *args, ranks: Ranks = Ranks(), **kwargs):        # noqa: B008  frozen
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        if own := vars(self).get("accelerator"):                        # what HFLM does on several GPUs only
            self._rank, self._world_size = own.process_index, own.num_processes

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[Score]:
        if not runtime.runtime_config(self.model)["steps"]:
            own = super()._loglikelihood_tokens(self.ranks.share(requests), disable_tqdm, override_bs)
            return self._of_all(own)
        groups = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            prefix, tail = self._cut(context, continuation)
            groups[tuple(prefix)].append((index, tail, len(continuation)))
        own, scores = self.ranks.share(list(groups.items())), {}
        for prefix, members in tqdm(own, disable=disable_tqdm or self._rolling, desc="compressed contexts"):
            scores |= self._score_group(list(prefix), members)
        return [score for _, score in sorted(self._of_all(list(scores.items())))]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._of_all(super().generate_until(self.ranks.share(requests), disable_tqdm))

    def _of_all(self, own: list) -> list:
        return [one for part in self.ranks.gather(own) for one in part]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """(what is prefilled and compressed, what is scored on the kept part)."""
        whole = (context + continuation)[-(self.max_length + 1):]
        if self._rolling:
            half = max(1, len(whole) // 2)
            return whole[:half], whole[half:]
        context = whole[:-len(continuation)]
        prefix, asked = split_context(context, ID["ask"]) if self._speaks_world() else (context, [])
        if not prefix:                                  # cut off on the left up to the question itself
            prefix, asked = context, []
        return prefix, asked + continuation

    def _speaks_world(self) -> bool:
        if not hasattr(self, "_world"):
            self._world = speaks_world(self.tokenizer)
        return self._world

    @torch.no_grad()
    def _score_group(self, prefix: list[int], members: list[tuple[int, list[int], int]]):
        """(index, score) of every tail asked after one prefix, each from the same compressed cache."""
        filled = self.model(torch.tensor([prefix], device=self.device), use_cache=True)
        inside = log_softmax(filled.logits[0].float(), -1)              # [T, vocabulary]
        cache, again = filled.past_key_values, []
        if not self._rolling and runtime.has_eviction(self.model):
            cache, again = cache.without_last(), prefix[-1:]
        for index, tail, count in members:
            table = torch.cat([inside, self._continue(cache, [*again, *tail[:-1]])])
            yield index, _score(table, [*prefix[1:], *tail], count)

    def _continue(self, cache, ids: list[int]) -> Tensor:
        """Log-probabilities [len(ids), vocabulary] after each of `ids`, on a frozen copy of the cache."""
        if not ids:
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        with runtime.frozen(self.model):
            logits = self.model(torch.tensor([ids], device=self.device), past_key_values=cache.fork()).logits
        return log_softmax(logits[0].float(), -1)

    def get_model_info(self) -> dict:
        return super().get_model_info() | {"llmopt": runtime.runtime_config(self.model)}


def _score(table: Tensor, tail: list[int], count: int) -> Score:
    """Sum of the last `count` tokens' log-probabilities, and whether each was the most likely one."""
    target = torch.tensor(tail[-count:], device=table.device)
    table = table[-count:]
    picked = table.gather(1, target[:, None]).sum().item()
    return picked, bool((table.argmax(-1) == target).all())
