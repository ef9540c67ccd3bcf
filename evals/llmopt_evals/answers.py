"""Answers read from a cache that was made smaller, added up over texts."""
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from llmopt.runtime.cache import LlmoptCache


@dataclass
class Answers:
    """exact: those of all `asked` whose every token is the first choice; loss: nats of their `tokens`.

    held: bytes of keys and values, positions apart; dense: those of caches from which nothing was dropped.
    """

    exact: int = 0
    asked: int = 0
    loss: float = 0.0
    tokens: int = 0
    held: int = 0
    dense: int = 0

    def hold(self, cache: LlmoptCache) -> None:
        """Add the bytes of one cache."""
        self.held, self.dense = self.held + cache.entry_nbytes(), self.dense + cache.dense_nbytes()

    def count(self, logits: Tensor, answer: Tensor) -> None:
        """Add an answer [n], read with these logits [n, V] in front of its tokens."""
        self.exact, self.asked = self.exact + bool((logits.argmax(-1) == answer).all()), self.asked + 1
        self.loss += cross_entropy(logits.float(), answer, reduction="sum").item()
        self.tokens += len(answer)

    @property
    def nats(self) -> float:
        """For each token of the answers."""
        return self.loss / max(1, self.tokens)

    @property
    def part(self) -> float:
        """What is held of the dense caches' bytes."""
        return self.held / max(1, self.dense)
