"""What of a model belongs to no block: embeddings, final norm, output head; and the tie between two of them."""
from dataclasses import dataclass

from torch import nn

from llmopt.errors import LlmoptError
from llmopt.model.blocks import at, final_norm, spec_of
from llmopt.model.links import Link, Norm
from llmopt.model.modeling import tell_tied
from llmopt.model.state import tied_names
from llmopt.model.weights import Projection, Weight, coded


@dataclass(frozen=True)
class Outside:
    """The parts of a model around its blocks."""

    model: nn.Module

    @property
    def embeddings(self) -> nn.Embedding:
        """The table [V, E] of the input tokens."""
        return self.model.get_input_embeddings()

    @property
    def table(self) -> Weight:
        """The same table as a weight that may have codes."""
        return Weight(self._name(self.embeddings), self.embeddings)

    @property
    def coded(self) -> list[Weight]:
        """The weights out here that have codes."""
        own = self.parameters()
        return [weight for weight in coded(self.model) if weight.key in own]

    @property
    def tables(self) -> list[nn.Embedding]:
        """All that is added up into the stream in front of the first block: tokens [V, E], learned positions [T, E]."""
        positions = spec_of(self.model).positions
        return [self.embeddings] + ([at(self.model, positions)] if positions else [])

    @property
    def final_norm(self) -> Norm:
        return final_norm(self.model)

    @property
    def head(self) -> Projection:
        """The output embedding [V, E]; a tied one has the table of the input tokens for its weight, see `untie`."""
        head = self.model.get_output_embeddings()
        return Projection(self._name(head), head)

    def _name(self, wanted: nn.Module) -> str:
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def links(self) -> list[Link]:
        """The final norm and the head that reads it. Raises LlmoptError where something stands between the two."""
        norm, head = self.final_norm, self.head
        if norm.weight is not None and len(norm.weight) != head.in_features:
            raise LlmoptError(f"{norm.name} and {head.path} differ in width: another map stands between them")
        return [Link(norm, [head])]

    @property
    def tied(self) -> bool:
        """True if the head shares its weight with the embeddings, by the config or by hand."""
        return bool(tied_names(self.model))

    def untie(self) -> None:
        """Give the head a weight of its own, and say so in the config: the checkpoint grows by it."""
        if self.tied:
            head = self.head
            head.module.weight = nn.Parameter(head.module.weight.detach().clone(), requires_grad=False)
            self.model.all_tied_weights_keys.pop(head.key, None)
            tell_tied(self.model.config, False)

    def tie(self) -> None:
        """Give the head the embeddings' weight, as it is now."""
        self.head.module.weight = self.embeddings.weight

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that belong to no block, by name; one that is tied under the name of the original alone."""
        inside, tied = f"{spec_of(self.model).layers}.", tied_names(self.model)
        return {name: parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)
                if not name.startswith(inside) and name not in tied}
