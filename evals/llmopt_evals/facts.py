"""Facts for a text to state once: sentences, the questions about them, and their answers.

`codes` are four figures, every one of which must be right; `words` are answers of a common word or two in sentences of
eight forms, so that the text is asked about more than one kind of thing; `mixed` is half of each.
"""
import math
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

LEAD = {"aware": "Question", "agnostic": "One more question"}
ADJECTIVES = ("amber", "silver", "quiet", "northern", "narrow", "marble", "velvet", "hollow", "golden", "distant",
              "copper", "frozen")
NOUNS = ("falcon", "harbour", "lantern", "orchard", "bridge", "archive", "glacier", "compass", "garden", "tower",
         "engine", "valley")
FIRST_NAMES = ("Alice", "Martin", "Clara", "Edgar", "Helen", "Oscar", "Nora", "Victor", "Julia", "Simon", "Emma",
               "Hugo")
SURNAMES = ("Brooks", "Carter", "Dalton", "Fisher", "Grant", "Harper", "Lowell", "Mason", "Norris", "Porter", "Sawyer",
            "Turner")
THINGS = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
PEOPLE = tuple(f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES)


@dataclass(frozen=True)
class Form:
    """A form of sentence that ends in its answer: "... {subject} ... {answer}."; question: with {subject}."""

    sentence: str
    question: str
    subjects: tuple[str, ...]
    answers: tuple[str, ...]


CODE = Form("The pass code of the {subject} is {answer}.", "What is the pass code of the {subject}?", THINGS,
            tuple(str(code) for code in range(1000, 10000)))
WORDS = (
    Form("The door of the {subject} is painted {answer}.", "In which colour is the door of the {subject} painted?",
         THINGS, ("red", "blue", "green", "yellow", "white", "black", "purple", "orange", "pink", "brown", "grey")),
    Form("{subject} grew up in {answer}.", "Where did {subject} grow up?", PEOPLE,
         ("London", "Paris", "Berlin", "Rome", "Madrid", "Vienna", "Boston", "Chicago", "Dublin", "Moscow", "Tokyo",
          "Athens")),
    Form("{subject} earns a living as a {answer}.", "As what does {subject} earn a living?", PEOPLE,
         ("teacher", "doctor", "farmer", "lawyer", "nurse", "writer", "driver", "painter", "banker", "sailor",
          "butcher", "singer")),
    Form("The statue in front of the {subject} is made of {answer}.",
         "What is the statue in front of the {subject} made of?", THINGS,
         ("wood", "glass", "stone", "iron", "steel", "clay", "gold", "bronze", "plastic", "concrete", "ice", "paper")),
    Form("The flag of the {subject} shows a {answer}.", "What does the flag of the {subject} show?", THINGS,
         ("lion", "horse", "snake", "fish", "wolf", "bear", "bird", "tree", "star", "ship", "rose", "dragon")),
    Form("For breakfast {subject} always has {answer}.", "What does {subject} always have for breakfast?", PEOPLE,
         ("soup", "rice", "bread", "cheese", "eggs", "honey", "fruit", "milk", "fish", "cake", "beans", "nuts")),
    Form("Every evening {subject} practises the {answer}.", "What does {subject} practise every evening?", PEOPLE,
         ("piano", "violin", "guitar", "flute", "trumpet", "drums", "harp", "organ")),
    Form("The market beside the {subject} is held in {answer}.", "When is the market beside the {subject} held?",
         THINGS,
         ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")),
)
FORMS = {"codes": (CODE,), "words": WORDS, "mixed": tuple(form for words in WORDS for form in (CODE, words))}


@dataclass(frozen=True)
class Fact:
    """One fact: who or what it is about, and what is true of it."""

    form: Form
    subject: str
    answer: str

    @property
    def told(self) -> str:
        """The sentence that states it."""
        return self.form.sentence.format(subject=self.subject, answer=self.answer)

    def asked(self, lead: str) -> str:
        """The question and the beginning of its answer. lead: a key of LEAD."""
        beginning = self.told.removesuffix(f" {self.answer}.")
        return f"\n\n{LEAD[lead]}: {self.form.question.format(subject=self.subject)}\nAnswer: {beginning}"

    def other(self, random: Random) -> "Fact":
        """The same of another answer, or once in a while of this one."""
        return Fact(self.form, self.subject, random.choice(self.form.answers))


def drawn(kind: str, count: int, random: Random) -> list[Fact]:
    """`count` facts, all forms in turn; within a form no subject twice, and an answer where there are too few alone."""
    forms = list(islice(cycle(FORMS[kind]), count))
    found = []
    for form, wanted in Counter(forms).items():
        subjects = random.sample(form.subjects, wanted)
        answers = list(form.answers) * math.ceil(wanted / len(form.answers))
        found += [Fact(form, *pair) for pair in zip(subjects, random.sample(answers, wanted), strict=True)]
    return found if kind == "codes" else random.sample(found, count)


def one_of_each_form(facts: list[Fact]) -> list[Fact]:
    """The first of each form."""
    return list({fact.form: fact for fact in reversed(facts)}.values())
