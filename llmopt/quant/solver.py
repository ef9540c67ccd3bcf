"""Who chooses the codes of a weight: the pieces that a quantization step names in `solver`."""
from abc import ABC
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llmopt.calibration.inputs import Seen
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.parts import Part
from llmopt.quant.grid import Spec


class Solver(Part, ABC):
    """Writes `quantize`, or, where the weights of a block are found together, `quantize_block`.

    inputs: what it must see of the calibration data behind the edited blocks and groups: nothing; the second moments
    of what a projection reads; the rows of it; "block": the whole block and all that goes through it.
    rowwise: no row of a weight sees another, so that processes may share them.
    sums: those of the `figures` that add up over rows; the others are alike for all. dense: whether moments tell what
    is missing at a weight as well, see calibration.inputs.Inputs; "outputs": of blocks, that visits show what the dense
    model writes. integers: knows no grid of floats.
    """

    kind = "solver"
    inputs: ClassVar[Literal["none", "moments", "rows", "block"]] = "none"
    rowwise: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ()
    integers: ClassVar[bool] = False

    @property
    def whole(self) -> bool:
        """True if a solver of blocks goes on with all of them, in memory: by `finish`, with what `prepare` has kept."""
        return False

    def prepare(self, model: nn.Module, run: Run) -> Any:
        """What `finish` needs of the model as it was found."""

    def finish(self, model: nn.Module, specs: Mapping[str, Spec], run: Run, prepared: Any) -> None:
        """Make the codes that stand in the model now better still; a resumed run comes here again."""

    @property
    def dense(self) -> Literal["none", "outputs", "inputs", "residual"]:
        return "none"

    def __init_subclass__(cls, **kwargs) -> None:
        """Raise TypeError for a solver that does not write what its `inputs` call for; a step would call nothing."""
        super().__init_subclass__(**kwargs)
        verb = "quantize_block" if cls.inputs == "block" else "quantize"
        if getattr(cls, verb) is getattr(Solver, verb):
            raise TypeError(f"{cls.__name__}: a solver with inputs = {cls.inputs!r} writes {verb}")

    def quantize(self, weight: Tensor, seen: Seen, spec: Spec) -> Quantized:
        """Codes and scales of `weight` [out, in] float32 (yours to change); put what you measured into `figures`.

        spec.live: where it may be other than 0. rowwise: `weight` may be some of the rows. A figure `loss` is half of
        what its rows' outputs lose (row_errors).
        """

    def quantize_block(self, visit: Visit, specs: Mapping[str, Spec],
                       run: Run) -> Iterator[tuple[Projection, Quantized]]:
        """The projections of a block that `specs` names; each is written before the next one is asked for.

        The visit shows all rows of the data, in every process. visit.wanted: None where nothing will be written.
        """

    def token_weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        """The weight of each real token of each batch in the moments ([N] per batch); None: all alike."""
        return None
