"""The 512 words of the world, their ids, and the facts and story tables fixed by the world's seed.

Everything is derived from SHAKE-256, so no library update can change what the weights have memorised.
"""

from hashlib import shake_256
from pathlib import Path

WORLD_SEED = "llmopt-world-1"


def read_words() -> dict[str, list[str]]:
    """The groups of words.txt, in order; a line that starts with white space goes on with the group before it."""
    groups: dict[str, list[str]] = {}
    name = ""
    for line in (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if not line[0].isspace():
            name, line = line.split(": ", 1)
        groups.setdefault(name, []).extend(line.split())
    return groups


GROUPS = read_words()
SPECIALS, MARKS, RELATIONS, VALUES = (GROUPS[name] for name in ("specials", "marks", "relations", "values"))
STORY = {name: GROUPS[name] for name in ("opener", "adjective", "actor", "verb", "preposition", "place")}
NAMES = [head + tail for head in GROUPS["heads"] for tail in GROUPS["tails"]]
WORDS = SPECIALS + MARKS + [word for group in STORY.values() for word in group] + RELATIONS + VALUES + NAMES
ID = {word: index for index, word in enumerate(WORDS)}
PAD, BOS, EOS, UNK = (ID[word] for word in SPECIALS)
HAS, ASK, TELL, COPY, AGAIN, STOP = (ID[word] for word in ("has", "ask", "tell", "copy", "again", "."))
NAME_IDS = [ID[word] for word in NAMES]
VALUE_IDS = [ID[word] for word in VALUES]
RELATION_IDS = [ID[word] for word in RELATIONS]
CONTENT_IDS = [index for index, word in enumerate(WORDS) if word not in SPECIALS + MARKS]


def speaks_world(tokenizer) -> bool:
    """True if a tokenizer (or None) has the world's words, and no others."""
    return tokenizer is not None and tokenizer.get_vocab() == ID


def digest(tag: str, size: int) -> bytes:
    """`size` bytes that depend on the world's seed and `tag` alone."""
    return shake_256(f"{WORLD_SEED}|{tag}".encode()).digest(size)


_FACTS = digest("facts", len(NAMES) * len(RELATIONS))


def fact_value(name: int, relation: int) -> int:
    """The token id of the value that the world's seed fixed for (name id, relation id)."""
    row, column = name - NAME_IDS[0], relation - RELATION_IDS[0]
    return VALUE_IDS[_FACTS[row * len(RELATIONS) + column] % len(VALUES)]
