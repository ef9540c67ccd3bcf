"""Progress bars of a terminal."""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from llmopt.progress import Progress, time_left


class Times(ProgressColumn):
    """Time since a loop began, and an estimate of what is left from all its items: rich's forgets slow ones."""

    def render(self, task: Task) -> Text:
        return Text(time_left(int(task.completed), int(task.total or 0), task.elapsed or 0), style="dim")


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """A Progress that draws a bar for each loop, which vanishes with it."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), Times())
    with Bars(*columns, console=console, transient=True) as drawn:
        def track(items: Iterable, label: str) -> Iterable:
            items = items if hasattr(items, "__len__") else list(items)
            return drawn.track(items, description=label)

        yield track
