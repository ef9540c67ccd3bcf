"""What the commands print: rich tables and progress on a terminal, plain lines or JSON elsewhere."""
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmopt.method import silent

ERR = Console(stderr=True)


def quiet_libraries() -> None:
    """Keep the libraries' own talk off the terminal; their errors still arrive as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|compressed_tensors")
    if not ERR.is_terminal:
        _without_bars()


def _without_bars() -> None:
    """Turn off the tqdm bars of every library: TQDM_DISABLE would be read too late, and is overruled by lm-eval."""
    import tqdm

    start = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = lambda self, *args, **kwargs: start(self, *args, **kwargs | {"disable": True})


def say(text: str) -> None:
    """One line about what happens now; only where someone watches."""
    if ERR.is_terminal:
        ERR.print(f"[dim]{text}[/dim]")


@contextmanager
def progress() -> Iterator[Any]:
    """A `Progress` for methods: bars on a terminal, silence elsewhere."""
    if not ERR.is_terminal:
        yield silent
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True) as bars:
        def track(items: Iterable, label: str) -> Iterable:
            items = items if hasattr(items, "__len__") else list(items)
            return bars.track(items, description=label)

        yield track


def print_table(title: str, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table on stdout; the first column left, the others right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


def human(size: float) -> str:
    """1234567 -> "1.23 MB" (powers of ten, as disks and hubs count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def show_result(facts: dict[str, Any], output: Path, as_json: bool) -> None:
    """The table at the end of `llmopt compress`."""
    if as_json:
        print_json(facts)
        return
    steps = " -> ".join(record["method"] for record in facts["records"])
    print_table(f"{facts['base_model']}: {steps}", ["", "before", "after"], facts["table"])
    for way, result in facts["loads_with"].items():
        click.echo(f"  loads with {way:<18} {result}")
    click.echo(f"written to {output}")


def show_scores(columns: dict[str, dict], as_json: bool) -> None:
    """Scores of one or two models side by side."""
    if as_json:
        print_json({name: {f"{task}/{metric}": v for (task, metric), v in column.items()}
                    for name, column in columns.items()})
        return
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [(task, metric, *(f"{column.get((task, metric), float('nan')):.4f}" for column in columns.values()))
            for task, metric in keys]
    print_table("lm-eval", ["task", "metric", *columns], rows)


def show_heads(name: str, scores: list, as_json: bool) -> None:
    """One row per layer."""
    if as_json:
        print_json({name: [layer.tolist() for layer in scores]})
        return
    width = max((len(layer) for layer in scores), default=0)
    rows = [(i, *(f"{v:.3f}" for v in layer.tolist())) for i, layer in enumerate(scores)]
    print_table(name, ["layer", *(f"head {h}" for h in range(width))], rows)


def show_folder(facts: dict[str, Any], config: dict[str, Any], as_json: bool) -> None:
    """A checkpoint's provenance, sizes and per-layer shapes."""
    if as_json:
        print_json(facts)
        return
    rows = [("base model", facts["base_model"]), ("file size", human(facts["bytes"])),
            ("format", facts["format"]), ("layers", config.get("num_hidden_layers", config.get("n_layer")))]
    rows += [(f"loads with {way}", result) for way, result in facts["loads_with"].items()]
    rows += [(name, f"{before} -> {after}") for name, before, after in facts.get("table", [])]
    rows += [(record["method"], _brief(record["meta"])) for record in facts.get("records", [])]
    print_table("checkpoint", ["", "value"], rows)
    layers = config.get("per_layer_config", {})
    if layers:
        print_table("layers with shapes of their own", ["layer", "config"], [(i, c) for i, c in layers.items()])


def _brief(meta: dict[str, Any]) -> str:
    plain = {k: v for k, v in meta.items() if isinstance(v, (int, float, str, bool))}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """The dry run: each step's plan, then sizes."""
    if as_json:
        print_json(plan)
        return
    print_table("plan (nothing was written)", ["step", "what it will do"], plan["steps"])
    click.echo(f"predicted size {human(plan['predicted_bytes'])}, dense {human(plan['dense_bytes'])}")


def show_methods(classes: list, detailed: bool, as_json: bool) -> None:
    """The registry, or one method's fields."""
    if as_json:
        print_json({cls.name: {"stage": cls.stage, "about": _first_line(cls),
                               "fields": {f.name: _default(f) for f in dataclasses.fields(cls)}} for cls in classes})
        return
    if not detailed:
        print_table("methods", ["method", "stage", "what"], [(c.name, c.stage, _first_line(c)) for c in classes])
        return
    cls, = classes
    import inspect

    click.echo(f"{cls.name} ({cls.stage})\n\n{inspect.getmodule(cls).__doc__.strip()}\n")
    rows = [(f.name, f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)), _default(f))
            for f in dataclasses.fields(cls)]
    print_table("fields", ["field", "type", "default"], rows)


def _default(item: dataclasses.Field) -> str:
    if item.default is not dataclasses.MISSING:
        return repr(item.default)
    return repr(item.default_factory()) if item.default_factory is not dataclasses.MISSING else "(needed)"


def _first_line(cls: type) -> str:
    import inspect

    return inspect.getmodule(cls).__doc__.strip().splitlines()[0]
