"""What a dry run has found out, which prints as it is read: a line a step, then size, memory and time."""
from typing import Any

from llmopt.progress import duration, human
from llmopt.run.table import as_html, as_text

HEADER = ["", "foretold"]


class Foretold(dict[str, Any]):
    """All that `compress --dry-run --json` prints; `print` shows the steps and the sums."""

    def _rows(self) -> list[list[str]]:
        low, high = map(duration, self["predicted_seconds"])
        return [*([step, act] for step, act in self["steps"]),
                ["level", self["level"]],
                ["size", f"{human(self['predicted_bytes'])}, dense {human(self['dense_bytes'])}"],
                ["peak memory", f"{human(self['predicted_memory'])}, {human(self['available_memory'])} available"],
                ["time without evaluation", low if low == high else f"{low} - {high}"],
                *(["advice", line] for line in self["advice"])]

    def __str__(self) -> str:
        return as_text(HEADER, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(HEADER, self._rows())
