"""Does a left-padded row of a batch go on, under methods that drop entries, as it does alone?

    python -m llmopt_evals.padding MODEL TEXT --ratio 0.5 "kv.snapkv: {window: 16}" kv.keydiff

Beside it, peers/kvpress_padding.py asks the same of kvpress, with the same tokens: a prompt of 120, one of 240 in the
same batch, and the 24 that `generate` puts behind the first. Words are entries of a recipe's `steps`, as
`continuations` reads them.
"""
import sys
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from llmopt import runtime
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_model
from llmopt.runtime.attach import attach
from llmopt.specs import ModelSpec
from llmopt_evals.continuations import learned
from llmopt_evals.entries import DENSE, Setting

SHORT, LONG, MORE = 120, 240, 24            # tokens of the two prompts, tokens that follow
START = 200                                 # where the longer one begins


@torch.inference_mode()
def following(model: nn.Module, ids: Tensor, mask: Tensor, setting: Setting) -> Tensor:
    """The tokens [B, MORE] that the model puts behind ids [B, T]."""
    with runtime.attached(model):
        for method, record in setting.parts:
            attach(model, method, record)
        return model.generate(ids, attention_mask=mask, max_new_tokens=MORE, min_new_tokens=MORE, do_sample=False,
                              pad_token_id=0)[:, ids.shape[1]:]


def alike(model: nn.Module, ids: Tensor, setting: Setting) -> float:
    """The part of the padded row's tokens that are those of the row alone; ids: [1, at least START + LONG]."""
    alone, longer = ids[:, :SHORT], ids[:, START:START + LONG]
    padding = torch.zeros(1, LONG - SHORT, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, alone], 1), longer])
    mask = torch.ones_like(batch).index_fill(1, torch.arange(LONG - SHORT), 0)
    mask[1] = 1
    together = following(model, batch, mask, setting)[0]
    return (together == following(model, alone, torch.ones_like(alone), setting)[0]).float().mean().item()


@click.command()
@click.argument("model")
@click.argument("text")
@click.argument("steps", nargs=-1)
@click.option("--ratio", "ratios", multiple=True, default=[0.5], show_default=True,
              help="The part that goes, of entries that do not say; repeatable.")
@click.option("--data", "source", help="Text for methods that learn from some.")
@click.option("--dtype", default="float32", show_default=True)
def main(model, text, steps, ratios, source, dtype) -> None:
    """Compare what is generated behind a prompt of TEXT alone and beside a longer one, under STEPS."""
    try:
        loaded, tokenizer = load_model(ModelSpec(id=model, dtype=dtype))
        ids = tokenizer(Path(text).read_text()[:6000], return_tensors="pt").input_ids
        if ids.shape[1] < START + LONG:
            raise LlmoptError(f"{text}: {ids.shape[1]} tokens at its beginning, {START + LONG} are wanted")
        for setting in [DENSE, *learned(loaded, tokenizer, steps, ratios, source)]:
            click.echo(f"{alike(loaded, ids, setting):.2f} of the tokens of the padded row are those of the row alone: "
                       f"{setting.words}{'' if setting.ratio is None else f', ratio {setting.ratio:g}'}")
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
