"""KVzip against attention computed by hand: the chunk's own keys draw attention too, and the request is asked first."""
import pytest
import torch

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from tests.kv.test_carried import queries_and_keys
from tests.tiny import ids, make

CONTRACT = {"ratio": 0.5}


class Words:
    """A tokenizer of one sentence."""

    def __call__(self, text, add_special_tokens):
        assert "Repeat" in text and not add_special_tokens
        return {"input_ids": [3, 5, 7]}


@torch.no_grad()
@pytest.mark.parametrize("plus", [False, True])
def test_it_keeps_what_a_second_reading_looks_at(plus):
    model, tokens = make("llama"), ids(1, 40)
    zipped = kv.KVzip(budget=10, allocate="uniform", sinks=0, window=0, chunk=16, plus=plus)
    with runtime.attached(model, zipped, run=Run(tokenizer=Words())):
        cache = model(tokens, use_cache=True).past_key_values
    best = torch.zeros(2, 40)
    _, keys = queries_and_keys(model, tokens, torch.arange(40)[None])
    for start in (0, 16, 32):
        again = torch.cat([torch.tensor([[3, 5, 7]]), tokens[:, max(0, start - 8):start + 16]], 1)
        places = torch.arange(40, 40 + again.shape[1])[None]
        query, own = queries_and_keys(model, again, places)
        logits = query[0].unflatten(0, (2, 2)) @ torch.cat([keys, own], 2)[0, :, None].mT / 4        # [G, g, t, T + t]
        later = torch.cat([torch.arange(40), places[0]])[None] > places[0][:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)[..., :40]
        if plus:
            weights = weights * said(model, tokens).unflatten(0, (2, 2))[:, :, None] / read(model, again)[0, :, None]
        best = torch.maximum(best, weights.amax((1, 2)))
    kept = cache.layers[0].kept
    for _, head, where in kept.heads():
        assert kept.positions[where].tolist() == best[head].topk(10).indices.sort().values.tolist()


def read(model, tokens):                                                                             # [B, T]
    """|x| of what the first layer's attention reads."""
    layer = model.model.layers[0]
    return layer.input_layernorm(model.model.embed_tokens(tokens)).norm(dim=-1)


def said(model, tokens):                                                                             # [H, T]
    """|v W_O| of the first layer, by query head."""
    attention, layer = model.model.layers[0].self_attn, model.model.layers[0]
    values = attention.v_proj(layer.input_layernorm(model.model.embed_tokens(tokens)))[0].unflatten(-1, (2, -1))
    parts = attention.o_proj.weight.T.unflatten(0, (4, -1))                                          # [H, D, E]
    return torch.stack([(values[:, head // 2] @ part).norm(dim=-1) for head, part in enumerate(parts)])


def test_a_forged_request_is_refused():
    model = make("llama")
    for request, fact in (("text", "request"), ([10**6], "token id 1000000")):
        with pytest.raises(LlmoptError, match=fact):
            kv.KVzip(ratio=0.5).restore(model, Record({"request": request}))


def test_positions_beyond_the_model_are_refused():
    model = make("gpt2")
    longest = model.config.max_position_embeddings
    with runtime.attached(model, kv.KVzip(ratio=0.5)), pytest.raises(LlmoptError, match=f"beyond the {longest} pos"):
        model(ids(1, longest - 2), use_cache=True)
