"""Learning by the clock: as many steps as there is time for, which go on where a run was cut off."""
import time
from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.calibration.descent import LOOKS, Course, Kept, Knobs, descend, split
from llmopt.method import Run
from llmopt.progress import silent

SPARE = 0.9                     # of the time is planned for
BETAS = (0.9, 0.95)


def learn(run: Run, name: str, loss: Callable[[int], Tensor], knobs: list[Knobs], epochs: float,
          minutes: float | None) -> tuple[float, float, int]:
    """(loss before, after, steps) of a descent on the run's batches, see `descend`; `loss` is that of one by its index.

    minutes: by the clock, at most; two steps are timed to plan for as many as fit, at most `epochs` times all batches.
    name: under which the state is kept ten times on the way.
    """
    learned, judged = split(len(run.batches))
    most = max(1, round(epochs * len(learned)))
    budget = None if minutes is None else 60 * minutes / (run.layers or 1)          # a rehearsal has but one block
    numbers = [number for knob in knobs for number in knob.numbers]
    steps = run.memory.remember(f"{name} steps", lambda: {"steps": most if budget is None else run.ranks.agree(
        planned(loss, numbers, learned[0], len(judged), most, budget))})["steps"]
    found = run.memory.latest(name)
    start = time.monotonic() - (found[1]["spent"] if found else 0)

    def spent() -> float:
        return time.monotonic() - start

    def save(tensors: dict[str, Tensor], told: dict) -> None:
        run.memory.keep_latest(name, tensors, told | {"spent": spent()})

    for _ in run.progress([0], name):
        course = Course(steps, signs=False, seed=run.seed, betas=BETAS, warm=steps // 20,
                        late=lambda: budget is not None and run.ranks.agree(spent() > budget),
                        progress=run.progress if run.layers is None else silent)
        first, last = descend(loss, learned, judged, knobs, course, Kept(lambda: found, save))
    return first, last, steps


@torch.enable_grad()
def planned(loss: Callable[[int], Tensor], numbers: list[Tensor], index: int, judged: int, most: int,
            budget: float) -> int:
    """How many steps fit into so many seconds, beside the looks at the batches `judged`; timed by two of them."""
    for number in numbers:
        number.requires_grad_()
    for _ in range(2):
        start = time.monotonic()
        torch.autograd.grad(loss(index), numbers, allow_unused=True)
        seconds = time.monotonic() - start
    looks = (LOOKS + 1) * judged * seconds / 3
    return max(1, min(most, int((SPARE * budget - looks) / seconds)))
