"""Questions about the context, asked aware (key seen before compression) or agnostic (cache compressed first).

Rule of the boundary: the context ends before the first `ask`. Aware questions are written with `tell` and so are
part of the context; text without `ask` is all context.
"""

from dataclasses import dataclass
from random import Random

from .documents import copied, fillers, statement
from .seeds import generator
from .words import ASK, BOS, CONTENT_IDS, HAS, NAME_IDS, RELATION_IDS, TELL, VALUE_IDS, WORDS, fact_value

MARKS = {"aware": TELL, "agnostic": ASK}
ROOM = {40: 80, 160: 160}  # tokens of filler among the statements of a document


@dataclass(frozen=True)
class Question:
    """A question: what is read, what must come next, and how many tokens lie between the fact and its answer."""

    context: tuple[int, ...]  # BOS included, the question not
    asked: tuple[int, ...]  # `ask key has`
    answer: tuple[int, ...]
    distance: int
    document: int


def split_context(ids: list[int], marker=ASK) -> tuple[list[int], list[int]]:
    """Cut token ids before the first `ask`: (what may be compressed, what is asked after it; empty without `ask`).

    `marker` is the id of `ask`, or a tokenizer that knows the word.
    """
    marker = marker if isinstance(marker, int) else marker.convert_tokens_to_ids("ask")
    ids = list(ids)
    cut = ids.index(marker) if marker in ids else len(ids)
    return ids[:cut], ids[cut:]


def recall_context(random: Random, count: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Statements among fillers: token ids, and (key, value, index of the value's token) in order of writing."""
    facts = zip(random.sample(NAME_IDS, count), random.choices(VALUE_IDS, k=count), strict=True)
    items = [(statement(*fact), fact) for fact in facts]
    items += [(ids, None) for ids, _ in fillers(random, ROOM.get(count, count))]
    random.shuffle(items)
    ids, places = [BOS], []
    for words, fact in items:
        if fact:
            places.append((*fact, len(ids) + 2))
        ids += words
    return ids, places


def recall_questions(count: int, form: str, documents: int = 16, each: int = 8, seed: int = 0) -> list[Question]:
    """`each` questions about each of `documents` contexts of `count` statements, spread over all distances."""
    found = []
    for document in range(documents):
        random = generator("eval", "recall", count, seed, document)
        context, places = recall_context(random, count)
        for index in range(each):
            low, high = index * count // each, (index + 1) * count // each
            key, value, place = places[random.randrange(low, max(high, low + 1))]
            asked = (MARKS[form], key, HAS)
            distance = len(context) + len(asked) - place
            found.append(Question(tuple(context), asked, (value,), distance, document))
    return found


def probes(count: int, length: int, seed: int = 0) -> list[tuple[list[int], ...]]:
    """(context, question, answer, corrupted) of `count` facts stated once, each in a context of its own.

    About `length` tokens, from seeds that no evaluation uses; corrupted: another value is stated.
    """
    found = []
    for index in range(count):
        random = generator("calibration", "probe", seed, index)
        context, places = recall_context(random, max(1, min(len(NAME_IDS), (length - 1) // 5)))
        key, value, place = random.choice(places)
        other = random.choice([i for i in VALUE_IDS if i != value])
        found.append((context, [ASK, key, HAS], [value], [*context[:place], other, *context[place + 1:]]))
    return found


def fact_questions(count: int | None = None, seed: int = 0) -> list[Question]:
    """`count` (or all) of the facts that the weights should know, as `name relation` -> value."""
    pairs = [(name, relation) for name in NAME_IDS for relation in RELATION_IDS]
    if count is not None:
        pairs = generator("eval", "facts", seed).sample(pairs, count)
    return [Question((BOS,), pair, (fact_value(*pair),), 0, index) for index, pair in enumerate(pairs)]


def copy_questions(count: int, span: int = 16, before: int = 6, seed: int = 0) -> list[Question]:
    """Spans to be written again, behind `before` other copies: `copy SPAN again` and two words -> its other words."""
    found = []
    for index in range(count):
        random = generator("eval", "copy", seed, index)
        *earlier, words = [random.choices(CONTENT_IDS, k=span) for _ in range(before + 1)]
        context = [BOS, *(token for other in earlier for part in copied(other) for token in part), *copied(words)[0]]
        found.append(Question(tuple(context), tuple(words[:2]), tuple(words[2:]), span + 1, index))
    return found


def text(ids) -> str:
    """Words joined by spaces, without the BOS that the tokenizer puts in front."""
    return " ".join(WORDS[index] for index in ids if index != BOS)
