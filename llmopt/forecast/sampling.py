"""What sampling calibration rows will take, from the first few tokens of them."""
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from llmopt.calibration.sampling import Sampler, kept, noise_of
from llmopt.forecast.times import Span, timed
from llmopt.specs import DataSpec

TOKENS = 6              # of each row that are really sampled


@dataclass
class Foretaste(Sampler):
    """A sampler for dry runs: kept rows where there are, else rows that begin as the real ones and go on with noise.

    spent: the seconds that sampling them all would take. Cost per token grows linearly with the cache, so it is the
    mean of a step in the beginning and one behind a cache filled to the end, whose memory is thereby really taken.
    """

    spent: Span = field(default_factory=Span)

    def own_rows(self, spec: DataSpec, length: int, first: int) -> list[list[int]]:
        found = kept(self.key(spec, length, first))
        return self._begun(range(first, first + spec.samples), length, spec.seed) if found is None else found

    def _begun(self, numbers: range, length: int, seed: int) -> list[list[int]]:
        part, memory, found = numbers[:self.width(length)], self.memory(), []
        short = min(length, TOKENS)

        def begin() -> None:
            found.extend(self.draw(part, noise_of(seed, part, short), memory, iter(range(short))))

        early = timed(begin) * (1 / max(1, short - 1))
        _fill(memory, length - short)
        late = timed(self.step, [row[-1] for row in found], memory)
        self.spent = (early + late) * (0.5 * (length - 1) * len(numbers) / len(part))
        rest = torch.randint(self.count, (len(numbers), length - short), generator=torch.Generator().manual_seed(seed))
        return [found[i % len(part)] + more for i, more in enumerate(rest.tolist())]


def _fill(memory: DynamicCache, count: int) -> None:
    """Put `count` more entries into every layer of a cache that holds any, not states alone: copies of its first."""
    for layer in memory.layers:
        if getattr(layer, "keys", None) is not None and count > 0:
            layer.update(*(held[:, :, :1].expand(-1, -1, count, -1) for held in (layer.keys, layer.values)))
