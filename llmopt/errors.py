"""What the user can mend: one exception family, and how a short fact gains place and nearest choice on its way out."""
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

LONGEST = 2000                 # characters of a message, a value or a list of choices included


def one_line(text: str) -> str:
    """`text` without line ends or terminal codes: names and values from foreign files may hold either."""
    text = text if len(text) <= 9 * LONGEST else f"{text[:5 * LONGEST]} ... {text[-3 * LONGEST:]}"
    line = " ".join(part.strip() for part in text.splitlines())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST * 3 // 4]} ... {line[-LONGEST // 4:]}"


class LlmoptError(ValueError):
    """Something the user can mend; its text is the whole message. Commands print it and exit with `exit_code`."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class FieldError(LlmoptError):
    """A field of a method holds a value that it cannot use. key: its path, such as `allocate.prefix.floor`."""

    def __init__(self, key: str, value: object, expected: str, tail: str = ""):
        super().__init__(f"{key}: {value!r} given, {expected} expected{tail}")
        self.key, self.value, self.expected, self.tail = key, value, expected, tail

    def below(self, path: str) -> "FieldError":
        """This error with the name of the field around its own in front."""
        return FieldError(f"{path}.{self.key}" if self.key else path, self.value, self.expected, self.tail)


class KeyUnknown(FieldError):
    """A key that its place does not have."""

    def __init__(self, key: str, tail: str):
        LlmoptError.__init__(self, f"unknown key {key!r}{tail}")
        self.key, self.tail = key, tail

    def below(self, path: str) -> "KeyUnknown":
        """This error with the name of the field around its own in front."""
        return KeyUnknown(f"{path}.{self.key}", self.tail)


class BudgetError(LlmoptError):
    """A total that no allocation can meet."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` in front of any short fact that is raised inside."""
    try:
        yield
    except LlmoptError as fact:
        raise LlmoptError(f"{where}: {fact}") from fact


def nearest(word: str, choices: Iterable[str]) -> str:
    """A tail for error messages: the closest valid choice, then all of them."""
    choices = sorted(choices)
    if not choices:
        return "; there are none"
    return f"{closest(word, choices)}. Choices: {', '.join(choices)}"


def closest(word: object, choices: Iterable[object]) -> str:
    """A tail for error messages: ` (did you mean 'bits'?)`, nothing where no choice is alike."""
    found = difflib.get_close_matches(str(word), [c for c in choices if isinstance(c, str)], n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
