"""Does a left-padded row of a batch go on under a press of kvpress as it does alone? In kvpress's own environment.

    PEER/bin/python evals/peers/kvpress_padding.py MODEL TEXT "SnapKVPress(0.5)" "KeyDiffPress(0.5)"
"""
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT, LONG, MORE = 120, 240, 24            # tokens of the two prompts, tokens that follow


@torch.inference_mode()
def following(model, ids, mask, words):
    """The tokens [B, MORE] that the model puts behind ids [B, T]."""
    with nullcontext() if words == "dense" else eval(words, vars(kvpress))(model):
        return model.generate(ids, attention_mask=mask, max_new_tokens=MORE, min_new_tokens=MORE, do_sample=False,
                              pad_token_id=0)[:, ids.shape[1]:]


def main():
    folder, text, *presses = sys.argv[1:]
    logging.disable(logging.WARNING)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text()[:6000], return_tensors="pt").input_ids
    alone, longer = ids[:, :SHORT], ids[:, 200:200 + LONG]
    padding = torch.zeros(1, LONG - SHORT, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, alone], 1), longer])
    mask = torch.cat([torch.cat([padding, torch.ones_like(alone)], 1), torch.ones_like(longer)])
    for words in ["dense", *presses]:
        together = following(model, batch, mask, words)[0]
        same = (together == following(model, alone, torch.ones_like(alone), words)[0]).float().mean().item()
        sys.stdout.write(f"{same:.2f} of the tokens of the padded row are those of the row alone: {words}\n")


if __name__ == "__main__":
    main()
