"""What `llmopt bench` prints."""
from typing import Any

import click

from llmopt.cli.tables import print_json, print_table
from llmopt.parts import default_of, fields_of, get
from llmopt.progress import human
from llmopt.run.table import with_error


def show_scale(found: dict[str, Any], as_json: bool) -> None:
    """`llmopt bench scale`: a row for each number of blocks, then the processes, then the commands."""
    if as_json:
        print_json(found)
        return
    rows = [(row["blocks"], human(row["model_bytes"]), human(row["peak_private"]), human(row["peak_mapped"]),
             f"{row['seconds_per_block']:.2f} s", f"{row['journal']:.1%}") for row in found["memory"]]
    print_table("streamed, one thread", ["blocks", "model", "peak private memory", "mapped files", "steps, a block",
                                         "journal"], rows)
    both = found["processes"]
    print_table(f"quant.gptq, {both['shape']}, one block", ["", "seconds"],
                [("one process", f"{both['one']:.1f}"), ("two processes", f"{both['two']:.1f}"),
                 ("times faster", f"{both['ratio']:.2f}")])
    for line in found["commands"]:
        click.echo(line)


def show_speeds(found: list[dict[str, Any]], shares: list[dict[str, Any]], as_json: bool) -> None:
    """`llmopt bench kv`: a row for each cache; milliseconds, how many times faster than the first cache, bandwidth.
    Behind it the shares of a prefill, a row for each scorer.
    """
    if as_json:
        print_json({"decoding": found, "scoring": shares})
        return
    if found:
        _show_decoding(found)
    if shares:
        lengths = list(dict.fromkeys(row["length"] for row in shares))
        told = {(row["method"], row["length"]): (f"{row['scores']:.1%}", f"{row['compression']:.1%}") for row in shares}
        rows = [(name, *(figure for length in lengths for figure in told[name, length]))
                for name in dict.fromkeys(row["method"] for row in shares)]
        print_table("share of a prefill", ["method", *(f"{what}, {length} tokens" for length in lengths
                                                       for what in ("scores", "whole compression"))], rows)


def _show_decoding(found: list[dict[str, Any]]) -> None:
    """A row for each cache, and the bandwidth of the memory."""
    rows = [(row["dim"], row["threads"], row["length"], row["cache"], human(row["bytes"]),
             f"{1000 * row['attention']:.2f} ms", f"{row['attention_ratio']:.2f}", f"{1000 * row['first']:.2f} ms",
             f"{1000 * row['step']:.1f} ms", f"{row['step_ratio']:.2f}", f"{row['of_bandwidth']:.0%}") for row in found]
    print_table("one token more", ["head dimension", "threads", "prompt", "cache", "holds", "attention, a layer",
                                   "faster", "first token", "whole step", "faster", "of bandwidth"], rows)
    for threads in dict.fromkeys(row["threads"] for row in found):
        speed = max(row["bandwidth"] for row in found if row["threads"] == threads)
        click.echo(f"memory is read at {speed / 1e9:.1f} GB/s by {threads} thread{'s' * (threads > 1)}")


def show_quantizers(found: dict[str, Any], as_json: bool) -> None:
    """`llmopt bench quant`: a row for each quantizer at each width; of one that failed, what it said."""
    if as_json:
        print_json(found)
        return
    given = found["data"]
    title = (f"{found['model']}: {given['rows']} x {given['tokens']} tokens ({given['source']}) to calibrate, "
             f"{given['scored_rows']} other rows scored")
    print_table(title, ["method", "bits", "group", "KL, nats", "above the least", "first choice alike", "file", "CPU s",
                        "solver's"], [_quantizer(row) for row in found["rows"]])
    for row in found["rows"]:
        if "failed" in row:
            click.echo(f"{row['method']}, {row['bits']} bits, failed: {row['failed']}")


def _quantizer(row: dict[str, Any]) -> list[str]:
    first = [row["method"], str(row["bits"]), "channel" if row["group_size"] == -1 else str(row["group_size"])]
    if "failed" in row:
        return [*first, *["-"] * 6]
    return [*first, with_error(row["kl"], row["kl_stderr"]),
            with_error(row["beyond"], row["beyond_stderr"]), f"{row['agreement']:.1%}", human(row["bytes"]),
            f"{row['cpu_process']:.1f}", f"{row['cpu_solver']:.1f}"]


def show_pruners(found: dict[str, Any], as_json: bool) -> None:
    """`llmopt bench prune`: a row for each pruner at each ratio; of one that failed, what it said."""
    if as_json:
        print_json(found)
        return
    given = found["data"]
    title = (f"{found['model']}: {given['rows']} x {given['tokens']} tokens ({given['source']}) to calibrate, "
             f"{given['scored_rows']} other rows ({given['scored']}) scored")
    print_table(title, ["method", "ratio", "nats added", "KL, nats", "first choice alike", "perplexity", "parameters",
                        "CPU s"], [_pruner(row) for row in found["rows"]])
    for row in found["rows"]:
        if "failed" in row:
            click.echo(f"{row['method']}, {row['ratio']:g}, failed: {row['failed']}")


def _pruner(row: dict[str, Any]) -> list[str]:
    first = [row["method"], f"{row['ratio']:g}"]
    if "failed" in row:
        return [*first, *["-"] * 6]
    return [*first, with_error(row["nats"], row["nats_stderr"]), with_error(row["kl"], row["kl_stderr"]),
            f"{row['agreement']:.1%}", f"{row['perplexity']:.4g}",
            f"{row['parameters'] / row['parameters_before'] - 1:+.1%}", f"{row['cpu']:.1f}"]


def show_lean(found: list[dict[str, Any]], as_json: bool) -> None:
    """`llmopt bench prune --part speed`: a row for each ratio and work."""
    if as_json:
        print_json(found)
        return
    rows = [(f"{row['ratio']:.0%}", row["work"], f"{1000 * row['seconds']:.1f} ms",
             f"{row['operations'] / 1e9:.2f} G", f"{row['faster']:.2f}", f"{row['of_promise']:.2f}") for row in found]
    print_table("pruned shapes, one thread",
                ["gone", "work", "CPU time", "operations", "faster", "of the promise"], rows)


def show_sparse(found: list[dict[str, Any]], as_json: bool) -> None:
    """`llmopt bench attention`: a row for each prompt and method."""
    if as_json:
        print_json(found)
        return
    rows = [(row["length"], row["dim"], _entry(row), f"{row['density']:.1%}", f"{1000 * row['selection']:.1f} ms",
             f"{1000 * row['attention']:.1f} ms",
             *(f"{row[key]:.2f}" if key in row else "-" for key in ("faster_attention", "faster", "used", "flex")))
            for row in found]
    print_table("sparse prefill, 8 query heads on 2, one thread",
                ["tokens", "dimension", "method", "pairs", "selection", "attention", "faster", "with selection",
                 "as used", "than flex_attention"], rows)
    for (length, dim), dense in {(row["length"], row["dim"]): row["dense"] for row in found}.items():
        click.echo(f"dense attention of {length:,} tokens, dimension {dim}: {1000 * dense:.1f} ms")


def show_recall(found: list[dict[str, Any]], as_json: bool) -> None:
    """`llmopt bench attention --part recall`: a row for each method."""
    if as_json:
        print_json(found)
        return
    print_table("of the attention that there is", ["method", "pairs", "read"],
                [(_entry(row), f"{row['density']:.1%}", f"{row['recall']:.1%}") for row in found])


def show_answers(found: list[dict[str, Any]], as_json: bool) -> None:
    """`llmopt bench attention --part answers`: a row for dense attention and one for each method."""
    if as_json:
        print_json(found)
        return
    print_table("answers", ["method", "pairs", "right", "CPU s to the first token", "faster"],
                [("dense" if row["method"] == "dense" else _entry(row), f"{row['density']:.1%}",
                  f"{row['exact']}/{row['asked']}", f"{row['seconds']:.2f}", f"{row['faster']:.2f}") for row in found])


def _entry(row: dict[str, Any]) -> str:
    """A method with those of its fields that are not as they are by default."""
    usual = {key: default_of(field) for key, field in fields_of(get(row["method"])).items()}
    told = ", ".join(f"{key}: {value}" for key, value in row["fields"].items() if value != usual[key])
    return f"{row['method']}{f' ({told})' if told else ''}"
