"""Expected attention against its formula written out, and against the mean over many drawn queries."""
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv.expected import expected_attention
from tests.kv.test_carried import queries_and_keys
from tests.tiny import ids, make

CONTRACT = {"ratio": 0.5}


class Heard(kv.Expected):
    """Notes what it sees of layer 0 and the scores it gives."""

    def score(self, view):
        scores = super().score(view)
        if view.layer == 0:
            self.found.append((view, scores))
        return scores


@torch.no_grad()
def heard(model, tokens, **fields):
    method = Heard(ratio=0.5, **fields)
    object.__setattr__(method, "found", [])
    with runtime.attached(model, method):
        model(tokens, use_cache=True)
    return method.found[0]


@torch.no_grad()
def test_it_is_the_formula():
    """Layer 0 by hand: queries and keys are turned by the model's own tables, position by position."""
    model, tokens, ahead = make("llama"), ids(1, 24), 5
    view, scores = heard(model, tokens, sinks=4, ahead=ahead)
    still = torch.zeros(1, 24, dtype=torch.long)                                      # position 0 does not turn
    queries, _ = queries_and_keys(model, tokens, still)
    _, keys = queries_and_keys(model, tokens, torch.arange(24)[None])
    eye = torch.eye(16)[None, None].expand(1, 1, -1, -1)
    tables = [model.model.rotary_emb(queries, torch.arange(24, 24 + ahead)[None])[i][0] for i in (0, 1)]
    half = torch.cat([-eye[..., 8:], eye[..., :8]], -1)
    turn = sum(eye * cos + half * sin for cos, sin in zip(*tables, strict=True))[0, 0] / ahead       # rows R e_i
    for group in range(2):
        total = 0
        for head in (2 * group, 2 * group + 1):
            own = queries[0, head, 4:]
            mean, spread = own.mean(0) @ turn, turn.T @ torch.cov(own.T, correction=0) @ turn
            logits = keys[0, group] @ mean / 4 + ((keys[0, group] @ spread) * keys[0, group]).sum(-1) / 32
            total = total + logits[4:].softmax(-1) / 2                           # the first four stay in any case
        assert_close(scores[0, group, 4:], total * view.values[0, group, 4:].norm(dim=-1), atol=1e-5, rtol=1e-4)
    assert bool((scores[0, :, :4] == scores.max()).all())


@torch.no_grad()
def test_it_is_the_mean_attention_of_queries_that_are_drawn():
    """exp(logit) averaged over a normal distribution of the same mean and spread, without rotary embedding."""
    model, tokens = make("gpt2"), ids(1, 40)
    view, _ = heard(model, tokens, sinks=0)
    queries = view.queries[0].double()                                                # [H, W, D]
    scores = expected_attention(view, 0, 8, view.holes)[0, 0].double() / view.values[0, 0].double().norm(dim=-1)
    factor = torch.linalg.cholesky(torch.cov(queries[0].T, correction=0) + 1e-9 * torch.eye(queries.shape[-1]))
    drawn = torch.randn(200_000, len(factor), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = (queries[0].mean(0) + drawn @ factor.T) @ view.keys[0, 0].double().T * view.rule.scaling
    wanted = logits.exp().mean(0)
    assert_close(scores, wanted / wanted.sum(), atol=1e-3, rtol=0.02)
