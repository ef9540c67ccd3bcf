"""What is known of the inputs of a projection, gathered while the walk goes through the blocks."""
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from llmopt.calibration.second_moments import Gram, mirrored_
from llmopt.scale.processes import Ranks


class Stats(Gram):
    """Second moments of a projection's input: hessian = (2 / N) sum_t r_t x_t x_t^T  [in, in], float32."""

    def __init__(self, ranks: Ranks = Ranks()):         # noqa: B008  frozen
        super().__init__(ranks)
        self.made: dict[Hashable, Any] = {}

    @property
    def hessian(self) -> Tensor | None:
        """None until a token has come."""
        return self.once("hessian", self._hessian) if self.tokens else None

    def _hessian(self) -> Tensor:
        return mirrored_(self.lower.float().mul_(2 / self.tokens))

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in `x` [N, in]; weights [N] scale the tokens' shares (None: all one)."""
        if len(x):
            super().add(x if weights is None else x.float() * weights.sqrt().unsqueeze(1))
            self.made.clear()

    def join(self, like: Tensor) -> None:
        super().join(like)
        if self.tokens:
            self.made["hessian"], self.lower = self.hessian, None   # twice the size of what is needed from here on

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first of the weights that read this input and kept for the others."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
