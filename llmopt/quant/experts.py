"""What is different where matrices of experts are quantized: what cannot be done with them yet, and what is told."""
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.model import beside_text, discovery
from llmopt.model.blocks import blocks, spec_of
from llmopt.quant.plan import DENSE, Target

Together = Literal["model", "layer", "stack", "expert"]
LEAVE = "ignore: [experts] leaves the experts as they are"


def refuse_experts(step: Any, found: Iterable[Target]) -> None:
    """Raise LlmoptError for a step that cannot quantize the experts among these weights."""
    own = [target for target in found if target.expert is not None]
    if not own:
        return
    first, open_ = own[0], next((target for target in own if not target.fixed), None)
    if open_ and step.allocate not in ("uniform", "sensitivity"):
        raise FieldError("allocate", step.allocate, "uniform or sensitivity where experts are quantized "
                         f"({open_.name}; {LEAVE})")
    if step.solver.inputs in ("rows", "block"):
        raise LlmoptError(f"{first.name}: {step.name} does not know experts; take quant.gptq, or {LEAVE}")
    for kind, first in ((kind, target) for target in own if (kind := step.scheme_of(target).inputs)):
        raise LlmoptError(f"{first.name}: what experts read cannot be rounded ({kind['num_bits']} bits): take a scheme "
                          f"for weights alone such as W4A16, or {LEAVE}")


def together(target: Target, how: Together) -> str:
    """The name of the unit that decides the bits of an expert's matrix."""
    stack, _, number = target.name.rpartition(".")
    return {"model": "experts", "layer": stack.rpartition(".")[0], "stack": stack,
            "expert": f"{stack.rpartition('.')[0]}.{number}"}[how]


def of_experts(found: Iterable[Target], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Of a record: how many of its weights are of experts, and solved with the tokens of their layer, for want of own
    ones; `unseen` of these were sent none.
    """
    own = [figures[target.name] for target in found if target.expert is not None and target.bits != DENSE]
    shared = [one for one in own if one.get("shared")]
    told = {"experts": len(own), "sharing": len(shared), "unseen": sum(not one["tokens"] for one in shared)}
    return told if any("shared" in one for one in own) else {"experts": len(own)} if own else {}


def left_dense(model: nn.Module) -> str:
    """What plans and cards say of the weights of the blocks that no quantization reaches; empty: there are none.

    Of a model in the table with experts: maps beside them that are too small, such as gates of shared experts.
    """
    spec = spec_of(model)
    if not spec.known or spec.ffn_out:
        return "; ".join(filter(None, (spec.note, beside_text.told(model))))
    left: Counter[str] = Counter()
    for block in blocks(model):
        own = {id(p.module) for p in block.projections()}
        left.update(name.rpartition(".")[2] for name, module in block.module.named_modules()
                    if discovery.is_linear(module) and id(module) not in own)
    told = ", ".join(f"{count} {name}" for name, count in left.items())
    return f"left dense: {told} (too small to be worth it)" if told else ""
