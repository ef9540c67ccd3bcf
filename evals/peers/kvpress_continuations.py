"""kvpress beside `python -m llmopt_evals.continuations`: the same FILE.jsonl, in an environment of kvpress's own.

    PEER/bin/python evals/peers/kvpress_continuations.py MODEL FILE.jsonl --ratio 0.9 "SnapKVPress(window_size=32)"

FILE.jsonl is one of `llmopt_evals.pieces`, or of facts, asked of the finished cache (`llmopt_evals.needles --probes`).
"""
import argparse
import copy
import json
import logging
import sys
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path

import kvpress
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PIECE = 8           # tokens read at a time where a press masks


def documents(file, tokenizer, limit):
    """(ids of a context [1, T], [(ids of a question and its answer [1, n], tokens of the answer)]) of the file."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    lines = map(json.loads, islice(Path(file).read_text().splitlines(), limit))
    for context, entries in groupby(lines, key=lambda entry: entry["context"]):
        asked = [(ids(entry["question"]), ids(entry["answer"])) for entry in entries]
        yield torch.tensor([first + ids(context)]), [(torch.tensor([q + a]), len(a)) for q, a in asked]


def read(model, ids):
    """(logits of the last token, the cache, what each attention was called with and gave) of a context."""
    cache, calls = DynamicCache(), {}
    hooks = [layer.self_attn.register_forward_hook(
        lambda module, _, given, output: calls.update({module: (given, output)}), with_kwargs=True)
        for layer in model.model.layers]
    last = model(ids, past_key_values=cache, logits_to_keep=1).logits
    for hook in hooks:
        hook.remove()
    return last, cache, calls


def compressed(model, press, ids, cache, calls):
    """A copy of the cache of a context after the press, which gets what its hooks would have got in the reading."""
    left, attentions = copy.deepcopy(cache), [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.masked_key_indices = None
    with nullcontext() if press is None else press(model):
        if isinstance(press, kvpress.KVzipPress):                     # reads again as it leaves; no chat in front
            press._context_ids, press._cache, press.prefix_length = ids, left, 0
        elif press is not None:
            for attention in attentions:
                given, output = calls[attention]
                press.forward_hook(attention, [], given | {"past_key_values": left}, output)
    return left


def sizes(model, cache):
    """(bytes of keys and values held, those of entries that are not masked)."""
    held = [part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)]
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    entry = 2 * cache.layers[0].keys.shape[-1] * cache.layers[0].keys.element_size()
    return sum(held), sum(held) - entry * sum(0 if places is None else len(places[0]) for places in masked)


def losses(model, last, cache, seen, rest, length):
    """(nats of the answer, whether each token is the first choice); a copy of the cache is continued at its place.

    Where entries are masked, one key has to be found that none of a piece's queries looks at: short pieces; where
    layers are of unequal length, transformers' mask fits single tokens alone.
    """
    cache, parts = copy.deepcopy(cache), [last]
    masks = any(getattr(layer.self_attn, "masked_key_indices", None) is not None for layer in model.model.layers)
    uneven = len({layer.keys.shape[2] for layer in cache.layers}) > 1
    step = 1 if uneven else PIECE if masks else rest.shape[1]
    for start in range(0, rest.shape[1] - 1, step):
        piece = rest[:, start:min(start + step, rest.shape[1] - 1)]
        places = torch.arange(seen + start, seen + start + piece.shape[1])[None]
        parts.append(model(piece, past_key_values=cache, position_ids=places).logits)
    logits, answer = torch.cat(parts, 1)[0, -length:].float(), rest[0, -length:]
    return cross_entropy(logits, answer, reduction="sum").item(), bool((logits.argmax(-1) == answer).all())


def press_of(words, ratio):
    """The press that an expression of kvpress's names makes; None: nothing is dropped."""
    if words == "dense":
        return None
    press = eval(words, vars(kvpress))
    press.compression_ratio = ratio
    return press


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("presses", nargs="+")
    parser.add_argument("--ratio", type=float, action="append", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--attention", default="sdpa", help="eager: presses that look at the whole map")
    parser.add_argument("--each", action="store_true", help="the nats of every answer too")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation=given.attention)
    trials = [(words, ratio) for words in given.presses for ratio in (given.ratio if words != "dense" else [0.0])]
    found = {trial: [] for trial in trials}
    texts = documents(given.file, AutoTokenizer.from_pretrained(given.model), given.limit)
    for ids, asked in texts:
        last, cache, calls = read(model.eval(), ids)
        for words, ratio in trials:
            left = compressed(model, press_of(words, ratio), ids, cache, calls)
            held, kept = (part / sizes(model, cache)[0] for part in sizes(model, left)) if ratio else (1.0, 1.0)
            found[words, ratio] += [(*losses(model, last, left, ids.shape[1], rest, length), length, held, kept)
                                    for rest, length in asked]
    for (words, ratio), rows in found.items():
        nats, exact, tokens, held, kept = (sum(column) for column in zip(*rows, strict=True))
        sys.stdout.write(f"{nats / tokens:.4f}  {exact:3d} of {len(rows)}  held {held / len(rows):6.1%}  "
                         f"kept {kept / len(rows):6.1%}  {ratio:.2f}  {words}\n")
        if given.each:
            sys.stdout.write(" ".join(f"{row[0] / row[2]:.4f}" for row in rows) + "\n")


if __name__ == "__main__":
    main()
