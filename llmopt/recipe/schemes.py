"""Names of whole settings, such as W4A16, that people know from other tools: a table, and what it does not hold."""
from dataclasses import dataclass, field
from typing import Any

from llmopt.errors import LlmoptError, closest

GROUP = 128         # columns that share a scale, in every scheme of integers


@dataclass(frozen=True)
class Scheme:
    """What a name stands for. form: of model/forms.py.

    inputs: how what a weight reads is rounded while the model runs, in compressed-tensors' words; None: it is not.
    """

    bits: int
    group_size: int = -1
    form: str = "int"
    symmetric: bool = True
    inputs: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def plain(self) -> bool:
        """True where the name says no more than the fields bits, group_size and symmetric can."""
        return self.form == "int" and self.inputs is None

    @property
    def in_bfloat16(self) -> bool:
        """True where transformers runs a model of no other type: what it unpacks is bfloat16, and so are inputs."""
        return self.inputs is not None and self.form in ("nvfp4", "mxfp4", "mxfp8")

    @property
    def static(self) -> bool:
        """True for inputs whose range calibration data tells."""
        return self.inputs is not None and self.inputs["dynamic"] is not True


def _rounded(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": True} | more


E8M0, E4M3 = {"scale_dtype": "torch.uint8"}, {"scale_dtype": "torch.float8_e4m3fn"}
SCHEMES: dict[str, Scheme] = {f"W{bits}A16": Scheme(bits, GROUP) for bits in range(2, 9)} | {
    "W4A16_ASYM": Scheme(4, GROUP, symmetric=False),
    "W8A8": Scheme(8, inputs=_rounded(8, "int", "token")),
    "FP8": Scheme(8, form="fp8 tensor", inputs=_rounded(8, "float", "tensor", dynamic=False)),
    "FP8_DYNAMIC": Scheme(8, form="fp8", inputs=_rounded(8, "float", "token")),
    "FP8_BLOCK": Scheme(8, 128, "fp8 block", inputs=_rounded(8, "float", "group", group_size=128)),
    "NVFP4": Scheme(4, 16, "nvfp4",
                    inputs=_rounded(4, "float", "tensor_group", dynamic="local", group_size=16, **E4M3)),
    "NVFP4A16": Scheme(4, 16, "nvfp4"),
    "MXFP4": Scheme(4, 32, "mxfp4", inputs=_rounded(4, "float", "group", group_size=32, **E8M0)),
    "MXFP4A16": Scheme(4, 32, "mxfp4"),
    "MXFP8": Scheme(8, 32, "mxfp8", inputs=_rounded(8, "float", "group", group_size=32, **E8M0)),
    "MXFP8A16": Scheme(8, 32, "mxfp8")}
ELSEWHERE = ("INT8", "W4A8", "W4A4", "W4AFP8", "MXFP6A16", "NF4", "Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")


def scheme_name(name: str) -> str:
    """The scheme of this name as the table spells it; upper and lower case are alike. Raises LlmoptError for none."""
    wanted = name.upper().replace("-", "_")
    if wanted in SCHEMES:
        return wanted
    there = f"Schemes: {', '.join(SCHEMES)}; or give bits alone"
    if wanted in ELSEWHERE:
        raise LlmoptError(f"scheme {name}: known elsewhere, not written by llmopt. {there}")
    raise LlmoptError(f"there is no scheme {name!r}{closest(wanted, SCHEMES)}. {there}")


def scheme_fields(name: str) -> dict[str, Any]:
    """The fields of a quant.* step that a scheme sets."""
    known = scheme_name(name)
    scheme = SCHEMES[known]
    if scheme.plain and scheme.symmetric:
        return {"bits": scheme.bits, "group_size": scheme.group_size}
    return {"scheme": known}
