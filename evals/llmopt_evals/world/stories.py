"""Stories from a grammar whose conditional distribution is known at every token.

A sentence is `opener [the] [adjective] actor verb [preposition the place] .`; each choice depends only on
words already written, so the probability of the next token given the prefix is one row of a table.
"""

from dataclasses import dataclass, field
from functools import cache
from math import log
from random import Random

from .words import BOS, ID, STOP, STORY, digest

THE = ID["the"]
OPENERS = ((THE, 0.6), (ID["then"], 0.25), (ID["later"], 0.15))
ADJECTIVE, END = 0.25, 0.25  # chance that an adjective is said; that a sentence ends after its verb
SKEW = 1.3  # option of rank r weighs (r + 1) ** -SKEW


@dataclass
class Story:
    """Token ids with the log-probability (nats) of each and the entropy of the choice it came from."""

    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    def put(self, token: int, logp: float = 0.0, entropy: float = 0.0) -> None:
        """Append one token; forced tokens have probability 1."""
        self.ids.append(token)
        self.logp.append(logp)
        self.entropy.append(entropy)


class Choice:
    """A discrete distribution over token ids, with its cumulative sums and entropy worked out once."""

    def __init__(self, weighted: list[tuple[int, float]]):
        total = sum(weight for _, weight in weighted)
        self.probability = {token: weight / total for token, weight in weighted}
        self.logp = {token: log(p) for token, p in self.probability.items()}
        self.entropy = -sum(p * log(p) for p in self.probability.values())

    def draw(self, random: Random) -> int:
        """One token id."""
        left = random.random()
        for token, p in self.probability.items():
            left -= p
            if left < 0:
                return token
        return token

    def write(self, story: Story, random: Random) -> int:
        """Draw a token, append it to `story`, return it."""
        token = self.draw(random)
        story.put(token, self.logp[token], self.entropy)
        return token


@cache
def ranked(group: str, given: int) -> list[tuple[int, float]]:
    """Words of `group` with weights whose order the world's seed fixed for the word `given`."""
    key = digest(f"story|{group}|{given}", 4 * len(STORY[group]))
    order = sorted(range(len(STORY[group])), key=lambda i: key[4 * i : 4 * i + 4])
    total = sum((rank + 1) ** -SKEW for rank in range(len(order)))
    return [(ID[STORY[group][i]], (rank + 1) ** -SKEW / total) for rank, i in enumerate(order)]


@cache
def choice(slot: str, given: int) -> Choice:
    """The distribution of `slot` after the word `given`: opener, subject, actor, verb, turn or place."""
    if slot == "opener":
        return Choice(list(OPENERS))
    if slot == "subject":  # an adjective, or at once the actor who comes after the last place
        adjectives = [(token, ADJECTIVE * p) for token, p in ranked("adjective", BOS)]
        return Choice(adjectives + [(token, (1 - ADJECTIVE) * p) for token, p in ranked("actor", given)])
    if slot == "turn":
        return Choice([(STOP, END)] + [(token, (1 - END) * p) for token, p in ranked("preposition", given)])
    return Choice(ranked(slot, given))


ADJECTIVES = {ID[word] for word in STORY["adjective"]}


def sentence(story: Story, random: Random, last: int) -> int:
    """Append one sentence; `last` is the word the next actor depends on, and the new one is returned."""
    if choice("opener", BOS).write(story, random) != THE:
        story.put(THE)
    subject = choice("subject", last).write(story, random)
    actor = choice("actor", subject).write(story, random) if subject in ADJECTIVES else subject
    verb = choice("verb", actor).write(story, random)
    if choice("turn", verb).write(story, random) == STOP:
        return verb
    story.put(THE)
    place = choice("place", verb).write(story, random)
    story.put(STOP)
    return place


def write_story(random: Random, length: int) -> Story:
    """A story of exactly `length` tokens (the last sentence may be cut)."""
    story, last = Story(), BOS
    while len(story.ids) < length:
        last = sentence(story, random, last)
    return Story(story.ids[:length], story.logp[:length], story.entropy[:length])
