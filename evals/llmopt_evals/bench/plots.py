"""Recall, or answers, of sparse prefill against the share of the pairs that is computed: a line for each method."""
from pathlib import Path
from typing import Any

from llmopt_evals.recall import check_plot as check

__all__ = ["check", "draw"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Points of `recall.measure` or `answers.measure`; entries of one method, with other fields, make its line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    of_answers = "asked" in rows[0]
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((row["density"], row["exact"] / row["asked"] if of_answers else row["recall"])
                        for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="os^v"[number // 10 % 4], label=method.removeprefix("attention."),
                  color=colormaps["tab10"](number % 10))
    axes.set(xlabel="share of the causal pairs that is computed", xlim=(0, 1.03), ylim=(0, 1.03),
             ylabel="right answers" if of_answers else "share of the attention that is read")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
