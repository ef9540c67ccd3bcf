"""The figures of a run side by side: sizes, bits, cache and scores, before and after."""
from html import escape
from typing import Any

from llmopt.progress import human


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
    after = {(task, metric): value for task, metric, value in facts.get("scores", {}).get("after", [])}
    for task, metric, value in facts.get("scores", {}).get("before", []):
        rows.append([f"{task} {metric}", f"{value:.4f}", f"{after.get((task, metric), float('nan')):.4f}"])
    return rows


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
