"""A tokenizer's chat template as the pieces that stand between turns, so that a model can write both sides of a talk.

The template is applied to turns of one known word each; what it puts around these words opens a conversation, and ends
the one side's turn and begins the other's (as Magpie does, Xu et al. 2024, which samples the user's turn only).
"""
import logging
from dataclasses import dataclass
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.files.limited import limited

LOG = logging.getLogger(__name__)
WORDS = ("llmoptfirst", "llmoptsecond", "llmoptthird")
DATE = "26 Jul 2024"            # for templates that tell the date, which otherwise would make other rows every day


@dataclass(frozen=True)
class Conversation:
    """Token ids: what opens a conversation up to the user's first word, and what stands between two turns.

    ends: the tokens by which a turn ends, besides the model's own end-of-text tokens.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    ends: frozenset[int]


def conversation_of(tokenizer: Any) -> Conversation | None:
    """The pieces of the tokenizer's chat template; None where it has none, or one that cannot be used so."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        opening, to_assistant, to_user = limited(lambda: _pieces(tokenizer), "the chat template cannot be used")
    except LlmoptError as fact:
        LOG.warning("calibration rows are sampled without conversations: %s", fact)
        return None
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ends = frozenset(piece[0] for piece in (to_assistant, to_user) if piece and piece[0] in special)
    return Conversation(tuple(opening), tuple(to_assistant), tuple(to_user), ends)


def _pieces(tokenizer: Any) -> list[list[int]]:
    turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), WORDS, strict=True)]
    with refusals("it refuses a conversation of three turns"):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=DATE)
    found = []
    for word in WORDS:
        before, there, text = text.partition(word)
        if not there:
            raise LlmoptError("it leaves out a turn of three")
        found.append(before)
    opening, _, to_user = found
    to_assistant = text                 # behind the last turn, with what calls for an answer
    return [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (opening, to_assistant, to_user)]
