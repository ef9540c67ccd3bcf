"""What the model reads at each step: four stages, the first three growing as recall succeeds."""

from dataclasses import dataclass
from random import Random

from .documents import OTHER, STORY, Row, copy_row, facts_row, pairs_row, recall_row, story_row
from .seeds import generator
from .words import EOS

COUNTS = ((2, 4, 8, 16), (4, 8, 16, 32), (16, 32, 64, 128, 160), (160,))  # facts in context, by stage and level
PASS, LEAST = 0.93, 12  # recall that ends a level, and the steps it lasts at least
PATIENCE = 120  # steps after which a level of stage 2 ends anyway: the mixture of the last stage teaches the rest
LENGTHS = ((128, 0.25), (256, 0.25), (512, 0.25), (1024, 0.25))  # last stage: length of a step's rows, probability
MIXTURE = {  # last stage, by length: share of facts, recall, story, copy
    128: (0.50, 0.28, 0.14, 0.08),
    256: (0.45, 0.32, 0.15, 0.08),
    512: (0.35, 0.43, 0.14, 0.08),
    1024: (0.20, 0.63, 0.12, 0.05),
}
UNKNOWN = 0.05  # loss weight of tokens that nothing predicts
STORY_WEIGHT = (0.05, 0.05, 0.05, 0.5)  # by stage


@dataclass
class Place:
    """A level of the curriculum; `score` is the running mean of recall there."""

    stage: int = 0
    level: int = 0
    steps: int = 0
    score: float = 0.0

    @property
    def count(self) -> int:
        """Statements in a document."""
        return COUNTS[self.stage][self.level]

    def update(self, recall: float) -> bool:
        """Take in one step's recall; true when the level (or stage) was passed."""
        self.steps += 1
        self.score = recall if self.steps == 1 else 0.9 * self.score + 0.1 * recall
        passed = self.score >= PASS and self.steps >= LEAST or self.stage == 2 and self.steps >= PATIENCE
        if self.stage == 3 or not passed:
            return False
        self.level += 1
        if self.level == len(COUNTS[self.stage]):
            self.stage, self.level = self.stage + 1, 0
        self.steps, self.score = 0, 0.0
        return True


def loss_weights(stage: int) -> list[float]:
    """Weight of each token kind in the loss: 1 for what can be known."""
    weights = [1.0] * 5
    weights[OTHER], weights[STORY] = UNKNOWN, STORY_WEIGHT[stage]
    return weights


def early_row(random: Random, place: Place, length: int) -> Row:
    """A row of stages 0 to 2."""
    if place.stage == 0 or (place.stage == 1 and random.random() < 0.5):
        return pairs_row(random, length)
    if place.stage == 1:
        return recall_row(random, length, place.count, filled=False)
    kind = random.random()
    if kind < 0.6:
        return recall_row(random, length, place.count, strewn=random.random() < 0.2)
    return facts_row(random, length) if kind < 0.85 else story_row(random, length)


def late_row(random: Random, length: int) -> Row:
    """A row of the last stage."""
    make = random.choices(("facts", "recall", "story", "copy"), MIXTURE[length])[0]
    if make == "recall":
        most = min(160, (length - 20) // 5)
        count = most if random.random() < 0.5 else int(4 * (most / 4) ** random.random())
        row = recall_row(random, length, count, strewn=random.random() < 0.4)
    else:
        row = {"facts": facts_row, "story": story_row, "copy": copy_row}[make](random, length)
    if random.random() < 0.1:  # text also comes without BOS, or behind another document
        row = Row(row.ids[1:] + [EOS], row.kinds[1:] + [OTHER])
    return row


def batch(place: Place, seed: int, step: int, tokens: int) -> list[Row]:
    """The rows of one step, a pure function of its arguments; all of one length, about `tokens` in all."""
    random = generator("train", seed, step)
    if place.stage == 3:
        length = random.choices([size for size, _ in LENGTHS], [share for _, share in LENGTHS])[0]
        return [late_row(random, length) for _ in range(max(1, tokens // length))]
    length = (4 * place.count + 1, 9 * place.count + 1, min(1024, 7 * place.count + 16))[place.stage]
    return [early_row(random, place, length) for _ in range(max(1, tokens // length))]
