"""Who chooses the codes of a weight: the pieces that a quantization step names in `solver`."""
from abc import ABC
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from torch import Tensor

from llmopt.calibration.inputs import Seen
from llmopt.calibration.walk import Visit
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.parts import Part
from llmopt.quant.grid import Spec


class Solver(Part, ABC):
    """Writes `quantize`, or, where the weights of a block are found together, `quantize_block`.

    inputs: what it must see of the calibration data behind the edited blocks and groups: nothing; the second moments
    of what a projection reads; the rows of it; "block": the whole block and all that goes through it.
    rowwise: no row of a weight sees another, so that processes may share them.
    sums: those of the `figures` that add up over rows; the others are alike for all.
    """

    kind = "solver"
    inputs: ClassVar[Literal["none", "moments", "rows", "block"]] = "none"
    rowwise: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ()

    def quantize(self, weight: Tensor, seen: Seen, spec: Spec) -> Quantized:
        """Codes and scales of `weight` [out, in] float32 (yours to change); put what you measured into `figures`.

        rowwise: `weight` may be some of the rows. A figure `loss` is half of what its rows' outputs lose (row_errors).
        """
        raise NotImplementedError(f"{type(self).__name__} does not write quantize")

    def quantize_block(self, visit: Visit, specs: Mapping[str, Spec]) -> Iterator[tuple[Projection, Quantized]]:
        """The projections of a block that `specs` names; each is written before the next one is asked for."""
        raise NotImplementedError(f"{type(self).__name__} does not write quantize_block")

    def token_weights(self, visit: Visit) -> list[Tensor] | None:
        """The weight of each real token of each batch in the moments ([N] per batch); None: all alike."""
        return None
