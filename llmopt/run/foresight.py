"""The memory forecast of a run that is under way, from the first block of each of its loops."""
import logging
from collections.abc import Iterable, Iterator

from torch import nn

from llmopt.forecast.memory import private_bytes
from llmopt.progress import Progress
from llmopt.scale.available import available
from llmopt.scale.gauge import Gauge

LOG = logging.getLogger(__name__)
NEWS = 1.1          # a forecast is said again when it has grown by more than a tenth
FLOOR = 10**8       # bytes: what is less is not worth a line, and mostly noise


class Foresight:
    """A Progress that tells from the first item of every loop how much memory the run will take.

    All items of a loop leave as much of the weights private as the first one. saving: bytes that come on
    top of that when the checkpoint is written and verified. peak: the forecast so far, in bytes above what the gauge
    found at its start.
    """

    def __init__(self, progress: Progress, gauge: Gauge, model: nn.Module, saving: int):
        self.progress, self.gauge, self.model, self.saving = progress, gauge, model, saving
        self.peak, self.said = max(gauge.lap().private, gauge.now().private + saving), 0

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items, before = list(items), private_bytes(self.model)
        self.peak = max(self.peak, self.gauge.lap().private)        # what came before the loop comes once
        for i, item in enumerate(self.progress(items, label)):
            if i == 1:
                self._foretell(label, len(items), before)
            yield item
        if len(items) == 1:
            self._foretell(label, 1, before)
        self.gauge.lap()                                            # what its other items took was foretold

    def _foretell(self, label: str, count: int, before: int) -> None:
        peak, now = self.gauge.lap().private, self.gauge.now().private
        coming = (count - 1) * max(0, private_bytes(self.model) - before)
        self.peak = max(self.peak, peak + coming, now + coming + self.saving)
        if self.peak > max(FLOOR, NEWS * self.said):
            self.said, free = self.peak, now + available()
            LOG.log(logging.WARNING if self.peak > free else logging.INFO,
                    "%s: judged by the first of %d, the run takes %.2f GB of memory; %.2f GB are available", label,
                    count, self.peak / 1e9, free / 1e9)
