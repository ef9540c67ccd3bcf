"""Names of whole settings, such as W4A16, that people know from other tools: a table, and what it does not hold."""
from typing import Any

from llmopt.errors import LlmoptError, closest

GROUP = 128         # columns that share a scale, in every scheme of integers

SCHEMES: dict[str, dict[str, Any]] = {f"W{bits}A16": {"bits": bits, "group_size": GROUP} for bits in range(2, 9)}
ELSEWHERE = ("W4A16_ASYM", "W8A8", "INT8", "W4A8", "W4A4", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4",
             "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP6A16", "MXFP8", "MXFP8A16", "NF4", "Q4_0", "Q4_K_M", "Q5_K_M",
             "Q8_0")


def scheme_fields(name: str) -> dict[str, Any]:
    """The fields of a quant.* step that a scheme sets; upper and lower case are alike."""
    wanted = name.upper().replace("-", "_")
    if wanted in SCHEMES:
        return dict(SCHEMES[wanted])
    there = f"Schemes: {', '.join(SCHEMES)} (weights of so many bits, activations as they are); or give bits alone"
    if wanted in ELSEWHERE:
        raise LlmoptError(f"scheme {name}: known elsewhere, not written by llmopt yet. {there}")
    raise LlmoptError(f"there is no scheme {name!r}{closest(wanted, SCHEMES)}. {there}")
