"""What the commands print: rich tables and progress on a terminal, plain lines or JSON elsewhere."""
import inspect
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llmopt.errors import one_line
from llmopt.parts import field_lines
from llmopt.progress import duration, human
from llmopt.run.table import with_error
from llmopt.scale.launch import is_main


class _Stderr:
    """Stderr as it is at the moment; a terminal that was closed, or a reader that has gone, does not end a run."""

    @property
    def _file(self) -> TextIO:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)      # behind what rich puts in its place

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:
        return self._file.encoding


# one process talks; text in notebooks too, where rich would ask for IPython's display and ipywidgets
ERR = Console(file=_Stderr(), force_terminal=None if is_main() else False, force_jupyter=False)
_TQDM_START = tqdm.__init__


ROWS, COLUMNS = 500, 130           # of a table


def quiet_libraries(downloads: bool = False) -> None:
    """Keep the libraries' own talk off the terminal; their errors still arrive as exceptions.

    downloads: those of huggingface_hub are what the command is about, and show how far they are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    if not downloads:
        transformers.logging.disable_progress_bar()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|compressed_tensors")
    _tame_bars({"delay": 2, "leave": False} if ERR.is_terminal and ERR.file.isatty() else LINES)


EVERY = 15          # seconds between two lines about a loop


class _BarLines:
    """A file for tqdm whose lines go to the log; tqdm's own clock and a loop's end would write more of them."""

    said = 0.0

    def write(self, text: str) -> None:
        line, now = text.strip(), time.monotonic()
        if line and now - self.said >= EVERY:
            logging.getLogger("llmopt").info(line)
            self.said = now

    def flush(self) -> None:
        pass


LINES = {"file": _BarLines(), "delay": EVERY, "mininterval": EVERY, "leave": False,
         "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed}, about {remaining} left"}


def _tame_bars(settings: dict[str, Any]) -> None:
    """Every library's tqdm bar: only while it takes long, as log lines off a terminal. TQDM_* is read too early."""
    tqdm.__init__ = lambda self, *args, **kwargs: _TQDM_START(self, *args, **kwargs | settings)


def print_table(title: str, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table on stdout; columns that begin with a figure to the right, words to the left.

    Of more rows or columns than any model makes, which a forged file may hold, the first are printed.
    """
    rows = list(islice(rows, ROWS + 1))
    cut = f", the first {ROWS} rows" if len(rows) > ROWS else ""
    cut += f", the first {COLUMNS} columns" if len(header) > COLUMNS else ""
    table = Table(title=one_line(title) + cut, title_justify="left")
    rows = [[one_line(str(cell)) for cell in row[:COLUMNS]] for row in map(tuple, rows[:ROWS])]
    for i, name in enumerate(header[:COLUMNS]):
        figures = i > 0 and all(row[i][:1] in "0123456789-." for row in rows)
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if Console(force_jupyter=False).is_terminal else 120
    Console(width=width, markup=False, emoji=False, force_jupyter=False).print(table)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def show_result(facts: dict[str, Any], output: Path, as_json: bool) -> None:
    """The table at the end of `llmopt compress`."""
    if as_json:
        print_json(facts)
        return
    steps = " -> ".join(record["method"] for record in facts["records"])
    print_table(f"{facts['base_model']}: {steps}", ["", "before", "after"], facts["table"])
    if told := facts.get("predictions"):
        forms = {"memory": ("peak memory", human), "seconds": ("time without evaluation", duration)}
        print_table("predictions", ["", "predicted", "measured"],
                    [(forms[what][0], *map(forms[what][1], figures)) for what, figures in told.items()])
    for way, result in facts["loads_with"].items():
        click.echo(f"  loads with {way:<18} {result}")
    for which, dates in facts.get("kept", {}).items():
        show_kept(f"scores {which}", dates)
    click.echo(f"written to {output}")


def show_times(seconds: dict[str, float], output: Path, as_json: bool) -> None:
    """Print the seconds of each part of a run over some blocks."""
    if as_json:
        print_json(seconds)
        return
    print_table("seconds", ["part", "seconds"], [(part, f"{value:.1f}") for part, value in seconds.items()])
    click.echo(f"{output}: some blocks only, to measure; not a model")


def show_kept(name: str, dates: dict[str, str]) -> None:
    """Which scores of one model were not measured now."""
    if dates:
        click.echo(f"{name}: {', '.join(dates)} kept from {', '.join(sorted(set(dates.values())))}; "
                   "--anew measures again")


def show_scores(columns: dict[str, dict], as_json: bool, kept: dict[str, dict[str, str]] | None = None) -> None:
    """Scores of one or two models side by side: {model: {(task, metric): (value, standard error or None)}}.

    kept: {model: {task: date}} of those that were not measured now.
    """
    told = {name: dates for name, dates in (kept or {}).items() if dates}
    if as_json:
        print_json({name: {f"{task}/{metric}{end}": figure for (task, metric), pair in column.items()
                           for end, figure in zip(("", "_stderr"), pair, strict=True) if figure is not None}
                    for name, column in columns.items()} | ({"kept": told} if told else {}))
        return
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [(task, metric, *(with_error(*column.get((task, metric), (None, None))) for column in columns.values()))
            for task, metric in keys]
    print_table("scores", ["task", "metric", *columns], rows)
    for name, dates in told.items():
        show_kept(name, dates)


def show_heads(figures: dict[str, list], as_json: bool) -> None:
    """Scores of every head, and what was measured beside them: a table each, a row per layer."""
    plain = {name: [list(map(float, layer)) for layer in layers] for name, layers in figures.items()}
    if as_json:
        print_json(plain)
        return
    for name, layers in plain.items():
        print_heads(name, layers)


def show_correlations(scores: dict[str, list], as_json: bool) -> None:
    """Rank correlations of head scores, each with each; empty where one of the two says the same of all heads."""
    from llmopt.heads.compare import rank_correlation

    found = {one: {other: rank_correlation(scores[one], scores[other]) for other in scores} for one in scores}
    if as_json:
        print_json(found)
        return
    rows = [(name, *("" if v is None else f"{v:.2f}" for v in row.values())) for name, row in found.items()]
    print_table("rank correlations", ["", *(name.removeprefix("heads.") for name in found)], rows)


def show_ablated(costs: dict[str, dict[str, dict]], how: str, as_json: bool) -> None:
    """What masking heads costs: a table for each score; of random heads the median (the lowest to the highest)."""
    def cell(value, *about) -> str:
        return with_error(value, *about) if len(about) == 1 else "{:.4f} ({:.4f} to {:.4f})".format(value, *about)

    if as_json:
        print_json({name: {kind: {f"{task}/{metric}": list(figure) if len(figure) > 2 else figure[0]
                                  for (task, metric), figure in column.items()} for kind, column in columns.items()}
                    for name, columns in costs.items()})
        return
    for name, columns in costs.items():
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        rows = [(*key, *(cell(*column[key]) for column in columns.values())) for key in keys]
        print_table(f"heads masked ({how}) by {name}", ["task", "metric", *columns], rows)


def print_heads(title: str, layers: list[list[float]]) -> None:
    """One row per layer, a cell for each head; layers of fewer heads end early."""
    width = max((len(layer) for layer in layers), default=0)
    rows = [(i, *(f"{v:.3f}" for v in layer), *[""] * (width - len(layer))) for i, layer in enumerate(layers)]
    print_table(title, ["layer", *(f"{h}" for h in range(width))], rows)


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """The dry run: each step's plan, how long each part takes, then size, memory and time."""
    if as_json:
        print_json(plan)
        return
    print_table("plan (nothing was written)", ["step", "what it will do"], plan["steps"])
    print_table("time", ["part", "seconds", "from"],
                [(part, f"{low:.2f} - {high:.2f}", how) for part, low, high, how in plan["seconds"]])
    print_table("private memory above the imports", ["part", "peak"],
                [(part, human(private)) for part, private in plan["peaks"]])
    click.echo(f"predicted size {human(plan['predicted_bytes'])}, dense {human(plan['dense_bytes'])}")
    click.echo(f"predicted peak memory {human(plan['predicted_memory'])}, {human(plan['available_memory'])} available")
    low, high = map(duration, plan["predicted_seconds"])
    click.echo(f"predicted time {low if low == high else f'{low} - {high}'}, evaluation not included")
    for line in plan["advice"]:
        click.echo(line)


def show_findings(found: list, as_json: bool) -> None:
    """`llmopt doctor`: a line for each finding, problems last, where they are seen."""
    ranked = sorted(found, key=lambda finding: ("ok", "note", "problem").index(finding.level))
    if as_json:
        print_json([finding._asdict() for finding in ranked])
        return
    for level, subject, fact in ranked:
        click.echo(one_line(f"{level:<8} {subject}: {fact}"))


def show_methods(classes: list, detailed: bool, as_json: bool) -> None:
    """The registry, or one method's fields."""
    if as_json:
        print_json({cls.name: {"stage": cls.stage, "about": _first_line(cls), "source": _text(cls), "fields": {
            key: {"takes": takes, "default": default, "meaning": meaning}
            for key, takes, default, meaning in field_lines(cls)}} for cls in classes})
        return
    if not detailed:
        print_table("methods", ["method", "stage", "what"], [(c.name, c.stage, _first_line(c)) for c in classes])
        return
    cls, = classes
    click.echo(f"{cls.name} ({cls.stage})\n\n{_text(cls)}\n")
    print_table("fields", ["field", "what it takes", "default", "meaning"], list(field_lines(cls)))


def _text(cls: type) -> str:
    return inspect.getmodule(cls).__doc__.strip()


def _first_line(cls: type) -> str:
    return _text(cls).splitlines()[0]
