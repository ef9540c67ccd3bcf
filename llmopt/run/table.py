"""The figures of a run side by side: sizes, bits, cache and scores, before and after."""
from html import escape
from typing import Any

from llmopt.progress import human

FIDELITY_TASK = "fidelity"
FIDELITY = {(FIDELITY_TASK, "kl"): "KL to the dense model (nats a token)",
            (FIDELITY_TASK, "agreement"): "first choice agrees", (FIDELITY_TASK, "perplexity"): "perplexity"}


def table(facts: dict[str, Any]) -> list[list[str]]:
    """Rows [what, before, after]."""
    (many, left), (full, kept) = facts["parameters"], facts["cache_bytes_per_token"]
    predicted = facts["predicted_bytes"]
    rows = [["file size", human(facts["dense_bytes"]), human(facts["bytes"])],
            ["predicted file size", "", human(predicted) if predicted else "not predicted"],
            ["parameters", f"{many:,}", f"{left:,}"],
            ["bits per parameter of the file", f"{8 * facts['dense_bytes'] / many:.2f}",
             f"{8 * facts['bytes'] / left:.2f}"],
            ["bits per quantized weight", f"{_dense_bits(facts):.0f}", _quantized_bits(facts)],
            ["cache bytes per token", f"{full:,.0f}", f"{kept:,.0f}"]]
    return rows + _scores(facts)


def _scores(facts: dict[str, Any]) -> list[list[str]]:
    """A row for each metric that the dense model has, or that is said of the compressed one against it."""
    values, errors = ({which: {(task, metric): value for task, metric, value in facts.get(kind, {}).get(which, [])}
                       for which in ("before", "after")} for kind in ("scores", "errors"))
    keys = [key for key in dict.fromkeys([*FIDELITY, *values["before"]])
            if key in FIDELITY or key[0] != FIDELITY_TASK]
    return [[FIDELITY.get(key, " ".join(key)),
             *(with_error(values[which].get(key), errors[which].get(key)) for which in ("before", "after"))]
            for key in keys if key in values["before"] or key in values["after"]]


def with_error(value: float | None, error: float | None) -> str:
    """A score, with its standard error where there is one."""
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _dense_bits(facts: dict[str, Any]) -> float:
    return round(8 * facts["dense_bytes"] / facts["parameters"][0] / 8) * 8


def _quantized_bits(facts: dict[str, Any]) -> str:
    found = [r["meta"]["bits"] for r in facts["records"] if r["method"].startswith("quant.") and "bits" in r["meta"]]
    return f"{found[-1]:.3f}" if found else "-"


def as_text(header: list[str], rows: list[list[str]]) -> str:
    """A table in plain text, its columns aligned: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in
              enumerate(zip(row, widths, strict=True))] for row in (header, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_html(header: list[str], rows: list[list[str]]) -> str:
    """A table for notebooks."""
    head, *body = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
                   for tag, row in (("th", header), *(("td", row) for row in rows)))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"
