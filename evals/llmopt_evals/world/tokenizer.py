"""The word-level tokenizer as an ordinary `tokenizer.json`."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .words import BOS, ID, SPECIALS

CHAT = "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}" + (
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at white space, BOS in front, decoding joins with spaces."""
    inner = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(SPECIALS)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    pad, bos, eos, unk = SPECIALS
    names = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unk}
    limits = {"model_max_length": 2048, "clean_up_tokenization_spaces": False, "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **limits)


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save_pretrained(folder)
