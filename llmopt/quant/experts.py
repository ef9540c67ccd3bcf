"""What is different where matrices of experts are quantized: what cannot be done with them yet, and what is told."""
from collections.abc import Iterable, Mapping
from typing import Any

from llmopt.errors import FieldError, LlmoptError
from llmopt.quant.plan import Target

LEAVE = "ignore: [experts] leaves the experts as they are"


def refuse_experts(step: Any, found: Iterable[Target]) -> None:
    """Raise LlmoptError for a step that cannot quantize the experts among these weights."""
    first = next((target for target in found if target.expert is not None and not target.fixed), None)
    if first is None:
        return
    if step.allocate != "uniform":
        raise FieldError("allocate", step.allocate, f"uniform where experts are quantized ({first.name}; {LEAVE})")
    if step.solver.inputs in ("rows", "block"):
        raise LlmoptError(f"{first.name}: {step.name} does not know experts; take quant.gptq, or {LEAVE}")
    if kind := step.scheme_of(first).inputs:
        raise LlmoptError(f"{first.name}: what experts read cannot be rounded ({kind['num_bits']} bits): take a scheme "
                          f"for weights alone such as W4A16, or {LEAVE}")


def of_experts(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a record: how many experts' matrices were solved with the tokens of the layer, in all and for want of any."""
    seen = [one for one in figures.values() if "shared" in one]
    if not seen:
        return {}
    shared = [one for one in seen if one["shared"]]
    return {"of_experts": len(seen), "sharing_tokens": len(shared),
            "without_tokens": sum(not one["tokens"] for one in shared)}
