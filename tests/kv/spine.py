"""What holds for every combination of cache methods on every architecture, and attention over a cache by hand."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from llmopt_kernels import NONE
from torch import Tensor
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from llmopt import recipe, runtime
from llmopt.files.packaged import recipes
from llmopt.kv.base import Scorer
from llmopt.kv.reducers import Evict
from llmopt.method import Method, Run
from llmopt.runtime.interface import attending_by
from llmopt.runtime.states import copied, states_by_layer
from tests import tiny

BY_HAND, KEY = "llmopt_by_hand", "_test_held"
LENGTH, PADS, TURNS = 64, 9, (34, 1, 1, 20, 8)
SMALL = {"window": 8, "sinks": 2, "residual": 4, "every": 4}     # at most: a prompt has LENGTH tokens
CHANGES = {"mistral": {"sliding_window": 20}, "mixtral": {"sliding_window": 20},
           "gemma2": {"attn_logit_softcapping": 5.0, "_attn_implementation": "eager"}}


def combinations() -> dict[str, tuple[Method, ...]]:
    """{name of a packaged recipe: its methods of the cache and the head scores that they ask for}."""
    found = {}
    for name in recipes():
        steps = recipe.load(name).steps
        cached = [step for step in steps if step.name.startswith("kv.")]
        asked = {"heads.replay", *(getattr(step, "heads", None) for step in cached)}
        if cached:
            found[name] = tuple(step for step in steps if step.stage == "runtime" or step.name in asked)
    return found


def model_of(family: str):
    return tiny.make(family, **CHANGES.get(family, {}))


def fitted(step: Method) -> Method:
    """The step with texts, a window, sinks and a residual that suit a tiny model, and few entries kept."""
    if step.name == "heads.replay":
        return replace(step, pieces=2, length=96, window=8)
    if not step.name.startswith("kv."):
        return step
    given = {item.name: getattr(step, item.name) for item in fields(step)}
    small = {key: value for key, value in SMALL.items() if (given.get(key) or 0) > value}
    return replace(step, **small, **({"ratio": 0.75} if "ratio" in given else {}))


def roomy(step: Method) -> Method:
    """The method of the cache with room for all that these tests read, as it is."""
    if step.name == "kv.quant":
        return replace(step, residual=2 * LENGTH)
    return replace(step, ratio=None, budget=2 * LENGTH) if step.name.startswith("kv.") else step


def turns(steps: list[Method]) -> bool:
    """True if one of them turns keys, which takes an entry in the table of architectures."""
    return any(part.turns for step in steps if isinstance(step, Scorer) for part in (step, step.reduce))


@contextmanager
def in_force(model, steps: list[Method]) -> Iterator[None]:
    """Apply the steps to the model, head scores before the rest, and take them off again."""
    run = Run(batches=[{"input_ids": tiny.ids(4, 48), "attention_mask": torch.ones(4, 48, dtype=torch.long)}])
    for step in steps:
        if step.stage == "score":
            step.apply(model, run)
    with runtime.attached(model, *(step for step in steps if step.stage == "runtime"), run=run):
        yield


def padded() -> tuple[Tensor, Tensor]:
    """Ids and mask [2, LENGTH]; the second row has padding in front."""
    tokens = tiny.ids(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, :PADS] = 0
    return tokens.masked_fill(mask == 0, 0), mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def read(model, tokens: Tensor, mask: Tensor, turns: tuple[int, ...], cache=None) -> tuple[Tensor, object]:
    """Logits [B, T, V] of the turns, and the cache behind them."""
    out, start = [], 0
    for size in turns:
        part = slice(start, start + size)
        result = model(tokens[:, part], attention_mask=mask[:, :part.stop], position_ids=places(mask)[:, part],
                       past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, part.stop
        out.append(result.logits)
    return torch.cat(out, 1), cache


def by_hand(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None,
            **kwargs):
    """Attention of new tokens over the entries that a cache holds and over each other, head by head."""
    held, mask = module.__dict__[KEY]                                   # Entries of each row; bool [B, seen + T]
    first, group = mask.shape[1] - query.shape[2], query.shape[1] // key.shape[1]
    i, out = torch.arange(first, mask.shape[1])[:, None], torch.empty_like(query)
    for row, entries in enumerate(held):
        for head in range(query.shape[1]):
            g = head // group
            at = torch.cat([entries.positions[g].long(), i[:, 0]])
            keys, values = (torch.cat(pair) for pair in ((entries.keys[g], key[row, g]),
                                                         (entries.values[g], value[row, g])))
            logits = query[row, head] @ keys.mT * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if "bias" in entries.carried:
                logits[:, :len(entries.carried["bias"][g])] += entries.carried["bias"][g]
            seen = (at != NONE) & (at <= i) & mask[row, at.clamp(min=0)]
            seen &= (i - at < sliding_window) if sliding_window is not None else True
            logits = logits.masked_fill(~seen, -torch.inf)
            if s_aux is not None:                                       # a key of value 0
                logits = torch.cat([logits, s_aux[head].expand(len(logits), 1)], 1)
                values = torch.cat([values, torch.zeros(1, values.shape[1])])
            out[row, head] = logits.softmax(-1) @ values
    return out.transpose(1, 2), None


AttentionInterface.register(BY_HAND, by_hand)
AttentionMaskInterface.register(BY_HAND, lambda *args, **kwargs: None)


def held_by(cache) -> list[list]:
    """The entries of every layer and row, in full precision."""
    return [[layer.row(row, cache.real(row)) for row in range(cache.batch_size)] if layer.groups else []
            for layer in cache.layers]


class StatesAlone(Cache):
    """Of an LlmoptCache what hybrids keep beside keys and values, and how many tokens were seen."""

    def __init__(self, cache):
        super().__init__(layers=[DynamicLayer() for _ in cache.layers])
        self.seen, self.states = cache.get_seq_length(), copied(cache.states)
        for name in ("conv_state", "recurrent_state"):
            for verb in ("get", "update"):
                setattr(self, f"{verb}_{name}", getattr(self.states, f"{verb}_{name}"))

    def update(self, key, value, *args, **kwargs):
        return key, value

    def get_seq_length(self, layer_idx=0):
        return self.seen


@torch.no_grad()
def continued_by_hand(model, cache, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of new tokens behind what the cache holds, by plain attention; mask: [B, seen + T]."""
    held = held_by(cache)
    with attending_by(model, BY_HAND, KEY, lambda layer, module: (held[layer], mask.bool())):
        states = {"use_cache": False} if cache.states is None else {
            "past_key_values": StatesAlone(cache), "attention_mask": mask}
        return model(tokens, position_ids=places(mask)[:, -tokens.shape[1]:], **states).logits


# ---------------------------------------------------------------------------------------------------- what must hold

def assert_room_for_all_is_dense(model, steps: list[Method]) -> None:
    """In any turns, in a padded batch and in beams, the model is what it is without methods; and so when they go.

    One with states rounds otherwise in turns than at once.
    """
    tokens, mask = padded()
    alike = TURNS if any(states_by_layer(model.config)) else (LENGTH,)
    asked = dict(attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    want, text = read(model, tokens, mask, alike)[0], model.generate(tokens, **asked)
    with in_force(model, [roomy(step) for step in steps]):
        got, real = read(model, tokens, mask, TURNS)[0], mask.bool()
        assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(tokens, **asked), text)
    assert torch.equal(read(model, tokens, mask, alike)[0], want)


def assert_what_is_kept_is_the_prompts(model, steps: list[Method]) -> None:
    """Keys and values of what one prompt leaves are those that the stock model has at these positions."""
    tokens, mask = padded()
    if any(getattr(step, "reduce", Evict()) != Evict() or step.name == "kv.quant" for step in steps):
        return
    whole = DynamicCache(config=model.config) if any(states_by_layer(model.config)) else DynamicCache()   # no windows
    stock = read(model, tokens, mask, (LENGTH,), whole)[1]
    with in_force(model, steps):
        cache = read(model, tokens, mask, (LENGTH,))[1]
    for layer, whole in zip(held_by(cache), stock.layers, strict=True):
        for row, entries in enumerate(layer):
            there = entries.positions != NONE
            at = entries.positions.clamp(min=0).long()[..., None].expand(entries.keys.shape)
            for mine, all_ in ((entries.keys, whole.keys[row]), (entries.values, whole.values[row])):
                assert_close(mine[there], all_.gather(1, at)[there], atol=1e-5, rtol=1e-5)


def assert_rows_and_attention(model, steps: list[Method]) -> None:
    """A padded row is what it is alone; what is read on, is read over the held entries that the mask does not hide."""
    tokens, mask = padded()
    with in_force(model, steps):
        both, cache = read(model, tokens, mask, TURNS)
        alone, single = read(model, tokens[1:, PADS:], mask[1:, PADS:], (TURNS[0] - PADS, *TURNS[1:]))
        packs = any(step.name == "kv.quant" for step in steps)
        assert_close(both[1, PADS:], alone[0], atol=3e-4 if packs else 1e-4, rtol=1e-3)
        assert all(torch.equal(a[1:], b) for a, b in zip(cache.kept(), single.kept(), strict=True))
        dense = sum(2 * min(LENGTH, layer.window or LENGTH) * layer.groups for layer in cache.layers)
        assert sum(int(entries.counts.sum()) for layer in held_by(cache) for entries in layer) < dense or packs
        cases = [(size, hidden, *_read_on(model, cache, mask, size, hidden)) for size, hidden in
                 ((5, False), (1, False), (5, True), (1, True))]
    for size, hidden, more, longer, got in cases:
        want = continued_by_hand(model, cache, more, longer)
        assert_close(got, want, atol=1e-5, rtol=1e-4, msg=lambda text, at=(size, hidden): f"{at}: {text}")
    assert float((cases[0][-1] - cases[2][-1]).abs().max()) > 1e-3          # the mask did hide entries


def _read_on(model, cache, mask: Tensor, size: int, hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    """New tokens, their mask, which hides old ones in the middle if `hidden`, and the logits of `model` for them."""
    more, longer = tiny.ids(2, size, seed=5), torch.cat([mask, torch.ones(2, size, dtype=torch.long)], 1)
    if hidden:
        longer[0, 40:60] = 0
        longer[1, 48:62] = 0
    with runtime.frozen(model), torch.no_grad():
        return more, longer, model(more, attention_mask=longer, position_ids=places(longer)[:, -size:],
                                   past_key_values=cache.fork()).logits


@torch.no_grad()
def assert_a_row_of_padding_disturbs_nobody(model, steps: list[Method]) -> None:
    """Beside a row without a token, another one is what it is alone; and the empty row can be read into later."""
    tokens, mask = padded()
    mask[1] = 0
    with in_force(model, steps):
        cache, single = read(model, tokens, mask, (34,))[1], read(model, tokens[:1], mask[:1], (34,))[1]
        more, longer = tiny.ids(2, 5, seed=5), torch.cat([mask[:, :34], torch.ones(2, 5, dtype=torch.long)], 1)
        at = places(longer)[:, 34:]
        both = model(more, attention_mask=longer, position_ids=at, past_key_values=cache).logits
        alone = model(more[:1], position_ids=at[:1], past_key_values=single).logits
    assert_close(both[:1], alone, atol=1e-4, rtol=1e-3)
    assert bool(both.isfinite().all())
