"""Text of the world for calibration and perplexity."""

import torch

from .documents import Row, copy_row, facts_row, fill, recall_row, story_row
from .questions import text
from .seeds import generator
from .stories import Story, write_story
from .words import BOS

KINDS = ("recall", "facts", "story", "recall", "facts", "copy", "recall", "facts", "story", "recall")  # in turn


def mixed_row(split: str, seed: int, index: int, length: int) -> Row:
    """Row `index` of a mixture of all document kinds, exactly `length` tokens, BOS first."""
    random, kind = generator(split, "mixed", seed, index), KINDS[index % len(KINDS)]
    if kind == "recall" and length >= 16:
        most = min(160, (length - 6) // 5)
        return recall_row(random, length, random.randint(max(1, most // 4), most))
    return {"facts": facts_row, "story": story_row, "copy": copy_row, "recall": story_row}[kind](random, length)


def calibration_ids(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [samples, length] of whole rows, no padding, from seeds that no evaluation uses."""
    return torch.tensor([mixed_row("calibration", seed, index, length).ids for index in range(samples)])


def calibration_text(samples: int, length: int, seed: int = 0) -> list[str]:
    """The calibration rows as text, for those who bring a tokenizer."""
    return [text(mixed_row("calibration", seed, index, length).ids) for index in range(samples)]


def perplexity_text(documents: int, length: int, seed: int = 0) -> list[str]:
    """Evaluation text: stories, and in every other document facts of the weights between their sentences."""
    rows = []
    for index in range(documents):
        random = generator("eval", "perplexity", seed, index)
        rows.append(fill(Row(), random, length) if index % 2 else story_row(random, length))
    return [text(row.ids) for row in rows]


def eval_stories(documents: int, length: int, seed: int = 0) -> list[Story]:
    """Stories with the exact log-probability of each token; BOS in front, as the model reads them."""
    stories = []
    for index in range(documents):
        story = write_story(generator("eval", "story", seed, index), length - 1)
        stories.append(Story([BOS, *story.ids], [0.0, *story.logp], [0.0, *story.entropy]))
    return stories
