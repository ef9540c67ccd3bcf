"""The model, data and eval sections of a recipe."""
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from llmopt.errors import FieldError
from llmopt.files.packaged import EMBEDDED, REFERENCE
from llmopt.parts import Checked, default_of, fields_of, in_our_words

BY_NAME = ("wikitext", "c4", "ultrachat", "pile")       # datasets of the hub; llmopt.calibration.hub tells which
WITH_PATH = ("text", "ids", "hub")
MAX_SAMPLES = 1_000_000
MAX_SEED = 2**32 - 1
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def dtype_name(given: Any) -> Any:
    """A type of numbers as recipes call it: bf16, torch.bfloat16 and torch's own object are bfloat16."""
    if not isinstance(given, str) and type(given).__name__ != "dtype":
        return given
    name = str(given).removeprefix("torch.")
    return SHORT.get(name, name)


def _spelled(*dtypes: str) -> BeforeValidator:
    """Takes other spellings of these types, and says so in the JSON Schema."""
    short = [word for word, name in SHORT.items() if name in dtypes]
    full = [f"torch.{name}" for name in dtypes if name != "auto"]
    return BeforeValidator(dtype_name, json_schema_input_type=Literal[(*dtypes, *short, *full)])


Dtype = Annotated[Literal["float32", "bfloat16", "float16"], _spelled("float32", "bfloat16", "float16")]
ComputeDtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"],
                         _spelled("auto", "float32", "bfloat16", "float16")]


@in_our_words
@dataclass(frozen=True)
class ModelSpec(Checked):
    """The model to compress."""

    id: str = Field(REFERENCE, description="a folder, a hub name or a GGUF file; llmopt/reference and "
                                       "llmopt/reference-moe, with experts, are the embedded models")
    dtype: Dtype | None = Field(None, description="null: the checkpoint's own; bf16, fp16, fp32 are known too")
    compute_dtype: ComputeDtype = Field(
        "auto", description="the type to compute in, not to store; auto: what is fast on this machine")
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    adapter: str | None = Field(None, description="a folder with a LoRA adapter of peft, to be merged into the weights")
    dequantize: bool = Field(False, description="read a checkpoint in fp8, mxfp4 or compressed-tensors as a dense one")
    gguf_file: str | None = Field(None, description="the GGUF file to read in the folder or hub model (llama.cpp's)")
    device: str = Field("cpu", description="cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="allow code that comes with the model to run")

    def check(self) -> None:
        if not self.id:
            raise FieldError("id", self.id, "a folder or a hub name")
        if self.gguf_file is not None and (self.gguf_file in (".", "..") or "/" in self.gguf_file):
            raise FieldError("gguf_file", self.gguf_file, "the name of a file in the model's folder")

    def at(self, folder: str) -> "ModelSpec":
        """This spec for a folder from which the model can be read as it lies there."""
        return replace(self, id=folder, gguf_file=None, dequantize=False, adapter=None)


@in_our_words
@dataclass(frozen=True)
class DataSpec(Checked):
    """Calibration data; llmopt.calibration.data tells what each source means."""

    name: Literal["self", "wikitext", "c4", "ultrachat", "pile", "world", "text", "ids", "hub"] | None = Field(
        None, description="the source; null: rows sampled from the model itself, for the embedded models their world")
    path: str | None = Field(None, description="a file (text, ids) or a dataset (hub)")
    config: str | None = Field(None, description="configuration of the dataset (hub)")
    split: str = Field("train", description="split of the dataset (hub)")
    column: str = Field("text", description="where a row keeps its text (hub, .jsonl)")
    template: Literal["chat"] | None = Field(None, description="chat: apply the tokenizer's chat template")
    samples: int = Field(128, ge=1, le=MAX_SAMPLES, description="rows at most")
    length: int | None = Field(None, ge=2, description="tokens of a row; null: 512 (self: 256), or the model's maximum")
    batch_size: int = Field(8, ge=1, le=MAX_SAMPLES, description="rows computed together")
    shifts: int = Field(1, ge=1, le=64, description="copies of each row, turned by equal parts of it (RSQ takes 8)")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="picks the rows")

    def check(self) -> None:
        if self.name is None and self.path is not None:
            raise FieldError("name", None, "text, ids or hub, because data.path is given,")
        if self.name in WITH_PATH and self.path is None:
            raise FieldError("path", None, f"a file or dataset, because data.name is {self.name!r},")
        if self.name in ("self", *BY_NAME):
            for key in ("path", "config", "split", "column", "template"):
                if (given := getattr(self, key)) != default_of(fields_of(DataSpec)[key]):
                    raise FieldError(key, given, f"nothing, as data.name is {self.name!r} (the source hub takes it),")

    def of(self, model: str) -> "DataSpec":
        """This spec with the source that a model (its id) gets where none is named."""
        return self if self.name else replace(self, name="world" if model in EMBEDDED else "self")


@in_our_words
@dataclass(frozen=True)
class EvalSpec(Checked):
    """What scores the dense and the compressed model: `fidelity` fits any model, all else are lm-eval's tasks."""

    tasks: list[str] = Field(default_factory=lambda: ["fidelity"], strict=False,
                             description="fidelity (KL to the dense model, agreement, perplexity), names lm-eval knows")
    limit: int | None = Field(None, ge=1, description="only the first documents of each task; null: all (fidelity: 16)")
    batch_size: int = Field(16, ge=1, description="requests computed together")
    text: str | None = Field(None, description="the file that the task text_ppl reads")


SECTIONS = {"model": ModelSpec, "data": DataSpec, "eval": EvalSpec}         # of a recipe
