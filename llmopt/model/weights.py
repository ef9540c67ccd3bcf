"""One weight matrix of a model: where it lies, how it is seen as [out, in], and its integer codes once it has some."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmopt.errors import LlmoptError
from llmopt.model.codes import Quantized

CODES = "_llmopt_codes"     # where a module keeps the codes of its weights, by (parameter, expert)
STACKS = "_llmopt_stacks"   # where a module of experts keeps how it was seen to use its stacks (expert_weights.py)

ROWS = 1024                 # that are worked on at once
Turn = Callable[[Tensor], Tensor]           # x -> x Q along the last dimension, Q orthogonal; float64


@dataclass
class Weight:
    """One matrix [out, in]: a parameter of a module, or the part of it that belongs to one expert of a stack [E, ...].

    path: the module's name. name: what recipes and records call the weight; key: its parameter in the state dict.
    """

    path: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.path if (self.parameter, self.expert) == ("weight", None) else self.stem

    @property
    def key(self) -> str:
        return f"{self.path}.{self.parameter}"

    @property
    def stem(self) -> str:
        """The beginning of the names of its packed tensors."""
        return self.key if self.expert is None else f"{self.key}.{self.expert}"

    @property
    def transposed(self) -> bool:
        """True where the module keeps [in, out]."""
        if self.expert is not None:
            seen = vars(self.module).get(STACKS, ())
            return any(stack.transposed for stack in seen if stack.parameter == self.parameter)
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in]; a view, so in-place writes reach the module."""
        values = getattr(self.module, self.parameter).data
        values = values if self.expert is None else values[self.expert]
        return values.T if self.transposed else values

    @property
    def stays_packed(self) -> bool:
        """True where the module multiplies with the codes themselves, and there is no dense weight."""
        return self.parameter not in self.module._parameters

    @property
    def dtype(self) -> torch.dtype:
        """The type of the dense weight."""
        return self.module.dtype if self.stays_packed else self.weight.dtype

    @property
    def codes(self) -> Quantized | None:
        """The integer codes that the weight stands for; None while it is dense."""
        return vars(self.module).get(CODES, {}).get((self.parameter, self.expert))

    @codes.setter
    def codes(self, codes: Quantized) -> None:
        vars(self.module).setdefault(CODES, {})[self.parameter, self.expert] = codes

    def write(self, weight: Tensor) -> None:
        """Replace all values; `weight` is [out, in] and is cast to the module's dtype."""
        self.weight.copy_(weight)

    def scale_columns_(self, factor: Tensor) -> None:
        """Multiply every input column by its `factor` [in], in float32, some rows at a time."""
        for rows in self.weight.split(ROWS):
            rows.copy_(rows.float() * factor)

    def turn_columns_(self, turn: Turn, gain: Tensor | float = 1.0) -> None:
        """W <- W diag(gain) Q, in float64, some rows at a time: for a reader of a stream that has become x Q."""
        for rows in self.weight.split(ROWS):
            rows.copy_(turn(rows.double() * gain))


@dataclass
class Projection(Weight):
    """One linear map of a block.

    parts: rows of each logical output, e.g. {"q": [H, D], "k": [G, D], "v": [G, D]} or {"gate": [F, 1], "up": [F, 1]}.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def out_features(self) -> int:          # as the module tells it: a packed weight has no such shape
        if self.expert is not None:
            return self.weight.shape[0]
        return self.module.nf if self.transposed else self.module.out_features

    @property
    def in_features(self) -> int:
        if self.expert is not None:
            return self.weight.shape[1]
        return self.module.nx if self.transposed else self.module.in_features

    @property
    def bias(self) -> Tensor | None:
        bias = None if self.expert is not None else self.module.bias
        return None if bias is None else bias.data

    def turn_rows_(self, turn: Turn) -> None:
        """W <- Q^T W and bias <- bias Q, in float64, some columns at a time: what it writes becomes y Q."""
        for columns in self.weight.T.split(ROWS):
            columns.copy_(turn(columns))
        if self.bias is not None:
            self.bias.copy_(turn(self.bias))

    def keep(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Cut the weight of a module of its own down to the given output rows and input columns (index tensors)."""
        weight = self.weight
        if rows is not None:
            weight = weight[rows]
            if self.module.bias is not None:
                self.module.bias = nn.Parameter(self.module.bias.data[rows].clone(), requires_grad=False)
        if columns is not None:
            weight = weight[:, columns]
        out, width = weight.shape
        stored = weight.T if self.transposed else weight
        setattr(self.module, self.parameter, nn.Parameter(stored.contiguous().clone(), requires_grad=False))
        if self.transposed:
            self.module.nf, self.module.nx = out, width
        else:
            self.module.out_features, self.module.in_features = out, width


def coded(model: nn.Module) -> list[Weight]:
    """The weights that have codes, in the order of the modules."""
    return [Weight(path, module, *place) for path, module in model.named_modules()
            for place in vars(module).get(CODES, {})]


def check_consistent(model: nn.Module) -> None:
    """Raise LlmoptError where a dense weight is not what its codes and scales stand for."""
    for found in coded(model):
        if found.stays_packed:
            continue
        codes, weight = found.codes, found.weight
        if weight.shape != codes.codes.shape or not torch.equal(codes.dequantize(weight.dtype), weight):
            raise LlmoptError(f"{found.name}: the weight was changed after it was quantized; quantization must be the "
                              "last step that edits weights; to train or write it as it is, call "
                              "llmopt.model.loaded.forget_codes(model) first")
