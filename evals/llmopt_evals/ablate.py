"""What masking heads costs: tasks with the K heads of the largest, of the smallest score, or as many others masked.

The others are drawn from those outside the top, several times, and the median is told, with the lowest and the highest.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from llmopt.errors import LlmoptError
from llmopt.heads.masking import How, masked, ranked, silenced
from llmopt.progress import Progress, silent
from llmopt_evals.evaluate import column, evaluate
from llmopt_evals.world import speaks_world

Column = dict[tuple[str, str], tuple[float | None, ...]]      # {(task, metric): (value, standard error or None)}
OF_THE_WORLD, OF_A_TEXT = ["world_recall", "world_ppl"], ["needles", "text_ppl"]


@dataclass(frozen=True)
class Asked:
    """The tasks, how many documents of each, what they read, and how often other heads are drawn.

    trust: code of task files may run.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    text: str | None = None
    draws: int = 20
    seed: int = 0
    batch_size: int = 16
    trust: bool = False


def usual_tasks(tokenizer: Any, text: str | None) -> list[str]:
    """Recall and perplexity: of the world where the model speaks it, else of a text, which must be given."""
    if text is None and not speaks_world(tokenizer):
        raise LlmoptError("--ablate needs tasks to lose: --text FILE for needles and text_ppl, or --tasks NAMES")
    return OF_THE_WORLD if text is None else OF_A_TEXT


def heads_of(wanted: float, scores: list[Tensor]) -> int:
    """The number of heads that `wanted` means: below 1 a share of all, rounded, else a number."""
    total = sum(map(len, scores))
    count = max(1, round(wanted * total)) if wanted < 1 else wanted
    if count != int(count) or not 1 <= count <= total // 2:
        raise LlmoptError(f"--ablate {wanted:g}: a share below 1 expected, or a number of heads up to {total // 2}, "
                          f"half of the model's {total}")
    return int(count)


def sets(scores: list[Tensor], count: int, draws: int, seed: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """("top" | "bottom" | "random", the (layer, head) to mask); random ones lie outside the top."""
    order, random = ranked(scores), Random(seed)
    yield "top", order[:count]
    yield "bottom", order[-count:]
    for _ in range(draws):
        yield "random", sorted(random.sample(order[count:], count))


def costs(model: nn.Module, tokenizer: Any, scores: dict[str, list[Tensor]], count: int, how: How, asked: Asked,
          means: list[Tensor] | None = None, progress: Progress = silent) -> dict[str, dict[str, Column]]:
    """{name of the score: {"nothing masked", "top K", "bottom K", "random K": a Column}}.

    A figure of random heads is (median, lowest, highest).
    """
    def measured() -> Column:
        return column(evaluate(model, [*asked.tasks], tokenizer, asked.limit, asked.batch_size, asked.text,
                               trust=asked.trust))

    dense = measured()
    return {name: {"nothing masked": dense, **_costs(model, values, count, (how, means), asked, measured, progress)}
            for name, values in scores.items()}


def _costs(model: nn.Module, scores: list[Tensor], count: int, way: tuple, asked: Asked,
           measured: Callable[[], Column], progress: Progress) -> dict[str, Column]:
    found: dict[str, list[Column]] = {}
    for kind, heads in progress([*sets(scores, count, asked.draws, asked.seed)], "masking heads"):
        with masked(model, silenced(scores, heads), *way), _no_other_bars():
            found.setdefault(kind, []).append(measured())
    columns = {f"{kind} {count}": found[kind][0] for kind in ("top", "bottom")}
    if asked.draws:
        drawn = {key: [one[key][0] for one in found["random"]] for key in found["top"][0]}
        columns[f"random {count}"] = {key: (median(values), min(values), max(values)) for key, values in drawn.items()}
    return columns


@contextmanager
def _no_other_bars() -> Iterator[None]:
    """lm-eval's bars, one or more for each task and set of heads, would write over that of the sets."""
    start = tqdm.__init__
    tqdm.__init__ = lambda self, *args, **kwargs: start(self, *args, **kwargs | {"disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = start
