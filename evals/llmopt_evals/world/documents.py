"""Documents of the world as token ids with a kind for each token, so that losses and scores can be told apart."""

from dataclasses import dataclass, field
from random import Random

from .stories import Story as _Story
from .stories import sentence, write_story
from .words import AGAIN, ASK, BOS, CONTENT_IDS, COPY, HAS, NAME_IDS, RELATION_IDS, STOP, TELL, VALUE_IDS, fact_value

OTHER, RECALL, FACT, STORY, SPAN = range(5)  # SPAN: the second writing of a copied span
KINDS = ("other", "recall", "facts", "story", "copy")


@dataclass
class Row:
    """Token ids and, for each, what kind of knowledge predicts it."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    kinds: list[int] = field(default_factory=lambda: [OTHER])

    def add(self, ids: list[int], kinds: list[int] | int) -> None:
        """Append tokens, all of one kind or of one kind each."""
        self.ids += ids
        self.kinds += kinds if isinstance(kinds, list) else [kinds] * len(ids)

    def cut(self, length: int) -> "Row":
        """The first `length` tokens."""
        return Row(self.ids[:length], self.kinds[:length])


def statement(key: int, value: int) -> list[int]:
    """`key has value .`"""
    return [key, HAS, value, STOP]


def question(key: int, value: int, mark: int) -> tuple[list[int], list[int]]:
    """`ask key has value .` and its kinds; `mark` is ASK (cache compressed before it) or TELL (after it)."""
    return [mark, key, HAS, value, STOP], [OTHER, OTHER, OTHER, RECALL, OTHER]


def pairs_row(random: Random, length: int) -> Row:
    """n adjacent pairs `key value`, then the same pairs in another order (what induction is learned from)."""
    pairs = list(zip(random.sample(NAME_IDS, (length - 1) // 4), random.choices(VALUE_IDS, k=length), strict=False))
    row = Row()
    for pair in pairs:
        row.add(list(pair), OTHER)
    for pair in random.sample(pairs, len(pairs)):
        row.add(list(pair), [OTHER, RECALL])
    return fill(row, random, length)


def fact(random: Random) -> tuple[list[int], list[int]]:
    """`name relation value`, the value being what the world's seed says."""
    name, relation = random.choice(NAME_IDS), random.choice(RELATION_IDS)
    return [name, relation, fact_value(name, relation)], [OTHER, OTHER, FACT]


def facts_row(random: Random, length: int) -> Row:
    """Weight facts one after another, each at most once."""
    row, count, width = Row(), (length + 1) // 3 + 1, len(RELATION_IDS)
    for index in random.sample(range(len(NAME_IDS) * width), count):
        name, relation = NAME_IDS[index // width], RELATION_IDS[index % width]
        row.add([name, relation, fact_value(name, relation)], [OTHER, OTHER, FACT])
    return row.cut(length)


def story_row(random: Random, length: int) -> Row:
    """One story."""
    row = Row()
    row.add(write_story(random, length - 1).ids, STORY)
    return row


def copied(span: list[int]) -> tuple[list[int], list[int]]:
    """`copy SPAN again` and `SPAN .`"""
    return [COPY, *span, AGAIN], [*span, STOP]


def copy_row(random: Random, length: int) -> Row:
    """`copy SPAN again SPAN .` with spans of 4 to 40 random words."""
    row = Row()
    while len(row.ids) < length:
        span = random.choices(CONTENT_IDS, k=random.randint(4, min(40, max(4, length // 3))))
        first, second = copied(span)
        row.add(first, OTHER)
        row.add(second, SPAN)
    return row.cut(length)


def filler(random: Random) -> tuple[list[int], list[int]]:
    """A sentence of a story, or now and then a weight fact, to stand between statements."""
    if random.random() < 0.25:
        ids, kinds = fact(random)
        return [*ids, STOP], [*kinds, OTHER]
    story = _Story()
    sentence(story, random, BOS)
    return story.ids, STORY


def fill(row: Row, random: Random, length: int) -> Row:
    """Fillers at the end until the row has `length` tokens."""
    while len(row.ids) < length:
        row.add(*filler(random))
    return row.cut(length)


def fillers(random: Random, room: int) -> list[tuple[list[int], list[int]]]:
    """Fillers of at most `room` tokens in all."""
    found, used = [], 0
    while True:
        item = filler(random)
        used += len(item[0])
        if used > room:
            return found
        found.append(item)


def recall_row(random: Random, length: int, count: int, strewn: bool = False, filled: bool = True) -> Row:
    """`count` statements among fillers, then (or strewn between them, after their statement) questions.

    Takes 4 * count tokens for the statements; the rest of `length` is shared by questions and fillers.
    """
    facts = list(zip(random.sample(NAME_IDS, count), random.choices(VALUE_IDS, k=count), strict=True))
    room = length - 1 - 4 * count
    asked = min(count, max(1, int(room * (random.uniform(0.3, 1.0) if filled else 1.0)) // 5))
    mark = random.choice((ASK, TELL))
    events = []
    for index, pair in enumerate(facts):
        said = random.random()
        events.append((said, statement(*pair), OTHER))
        if index < asked:  # keys are a random sample already, and `said` is independent of the index
            events.append((random.uniform(said, 1) if strewn else 1 + random.random(), *question(*pair, mark)))
    if filled:
        events += [(random.random(), *item) for item in fillers(random, room - 5 * asked)]
    row = Row()
    for _, ids, kinds in sorted(events, key=lambda event: event[0]):
        row.add(ids, kinds)
    return fill(row, random, length)
