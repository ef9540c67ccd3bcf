"""What a run did and what came of it."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.checkpoint.save import load, save
from llmopt.errors import LlmoptError
from llmopt.files.shards import written_bytes
from llmopt.forecast.size import Prediction, checkpoint_bytes
from llmopt.method import Method, Record
from llmopt.model.loading import resolve
from llmopt.progress import duration, human
from llmopt.recipe.reader import Recipe
from llmopt.run.table import as_html, as_text, table

SAVED = 250 * 10**6         # bytes of a checkpoint written, read again and compared in a second: an estimate


HEADER = ["", "before", "after"]
FORMS = {"memory": human, "seconds": duration}


@dataclass(repr=False)
class Report:
    """The account of a run: `print(report)` shows sizes, bits, cache and scores, before and after.

    After `llmopt.compress` its `model` (and `tokenizer`) can be used, and `save(FOLDER)` writes the checkpoint; after
    `llmopt.run` the checkpoint is in `output`, from where `model` is loaded when it is asked for.
    records: [{"method": name, "fields": {...}, "meta": {...}}, ...]; sizes in bytes of safetensors. Times stay out of
    `to_dict`: a run repeated writes the same bytes.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    calibration: str | None = None     # SHA-256 of the calibration data
    made_from: dict[str, Any] | None = None         # see run/marks.py; None where no recipe was run
    calibrated: dict[str, int] = field(default_factory=dict)       # how many samples and tokens it has
    dense_bytes: int = 0
    dense_parameters: int = 0
    parameters: int = 0
    cache_before: float = 0.0          # bytes per token of context
    cache_after: float = 0.0
    predicted_bytes: int | None = None
    streamed: bool = False             # one block in memory at a time; the result is the same
    messages: list[str] = field(default_factory=list)     # of a resumed run: what was there, what was damaged
    seconds: dict[str, float] = field(default_factory=dict)
    predicted_memory: int = 0          # bytes of private memory above the imports' at the peak
    predicted_seconds: float = 0.0
    memory: int | None = None          # as measured, if a gauge was given
    scores: dict[str, list] = field(default_factory=dict)          # "before" and "after": [[task, metric, value], ...]
    errors: dict[str, list] = field(default_factory=dict)          # their standard errors, in the same form
    output: Path | None = None         # the checkpoint, once it is written
    recipe: Recipe | None = None       # what was run, if all of it can be written down
    said: dict[str, str] = field(default_factory=dict)      # of a recipe: its format and max_shard_size
    made: tuple[Any, Any] | None = field(default=None, compare=False)       # (model, tokenizer)

    @property
    def model(self) -> Any:
        """The compressed model, ready for `generate`."""
        return self._made()[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None where none is known."""
        return self._made()[1]

    def _made(self) -> tuple[Any, Any]:
        if self.made is None:
            if self.output is None:
                raise LlmoptError("this report holds no model")
            self.made = load(self.output)
        return self.made

    def save(self, output: str | Path, **options: Any) -> Path:
        """Write the checkpoint with tokenizer and card to a folder; options: those of `llmopt.save`."""
        source = resolve(self.recipe.model) if self.recipe else None
        self.output = save(self.model, output, **{"tokenizer": self.tokenizer, "source": source, "recipe": self.recipe,
                                                  "report": self} | self.said | options)
        return self.output

    def take(self, facts: dict[str, Any]) -> None:
        """Take in the scores of the checkpoint's llmopt.json, and their standard errors."""
        self.scores, self.errors = facts.get("scores", {}), facts.get("errors", {})

    @property
    def size(self) -> int:
        """Bytes of the checkpoint's safetensors, as it stands or as it would be written."""
        return written_bytes(self.output) if self.output else checkpoint_bytes(self.model)

    @classmethod
    def of(cls, facts: dict[str, Any], output: Path) -> "Report":
        """The report of a checkpoint that an earlier run has finished, from its llmopt.json."""
        (many, left), (full, kept) = facts["parameters"], facts["cache_bytes_per_token"]
        return cls(facts["records"], facts["seed"], facts["calibration_sha256"], facts["made_from"],
                   facts["calibration"], facts["dense_bytes"], many, left, full, kept, facts["predicted_bytes"],
                   scores=facts.get("scores", {}), errors=facts.get("errors", {}), output=output)

    def _rows(self) -> list[list[str]]:
        if self.made is None and self.output is None:
            return []
        facts = self.to_dict() | {"bytes": self.size, "scores": self.scores, "errors": self.errors}
        measured = [row for row in table(facts) if row[-1] != "not predicted"]
        foreseen = [(what, FORMS[what](told), FORMS[what](found)) for what, (told, found) in self.predictions().items()]
        return measured + [[f"{what}: predicted, measured", told, found] for what, told, found in foreseen]

    def __str__(self) -> str:
        steps = " -> ".join(record["method"] for record in self.records) or "nothing was done"
        rows = self._rows()
        return f"{steps}\n{as_text(HEADER, rows)}" if rows else steps

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(HEADER, self._rows())

    def predictions(self) -> dict[str, list]:
        """{"memory" and "seconds": [predicted, measured]}, where both are known; they differ from run to run."""
        if self.messages:                                               # a resumed run has less to do
            return {}
        told = {"memory": [self.predicted_memory, self.memory]} if self.memory is not None else {}
        if "total" in self.seconds:
            told["seconds"] = [round(self.predicted_seconds, 2), round(self.seconds["total"], 2)]
        return told

    def predict(self, told: Prediction, steps: float, memory: int) -> None:
        """Take in what was foreseen; steps: seconds of all of them, memory: bytes, both as their first blocks tell."""
        self.predicted_bytes, self.predicted_memory = told.bytes, memory
        self.predicted_seconds = self.seconds["load"] + self.seconds["cache"] + steps + told.bytes / SAVED

    def to_dict(self) -> dict[str, Any]:
        return {"records": self.records, "seed": self.seed, "calibration_sha256": self.calibration,
                "calibration": self.calibrated, "made_from": self.made_from,
                "dense_bytes": self.dense_bytes, "parameters": [self.dense_parameters, self.parameters],
                "predicted_bytes": self.predicted_bytes,
                "cache_bytes_per_token": [self.cache_before, self.cache_after]}


def describe(step: Method, record: Record) -> dict[str, Any]:
    """A record as llmopt.json keeps it."""
    (name, fields), = step.to_dict().items()
    return {"method": name, "fields": fields, "meta": record.meta}
