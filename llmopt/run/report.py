"""What a run did and what came of it."""
from dataclasses import dataclass, field
from typing import Any

from llmopt.forecast.size import Prediction
from llmopt.method import Method, Record

SAVED = 250 * 10**6         # bytes of a checkpoint written, read again and compared in a second: an estimate


@dataclass
class Report:
    """The account of a run. Times stay out of `to_dict`: a run repeated writes the same bytes.

    records: [{"method": name, "fields": {...}, "meta": {...}}, ...]; sizes in bytes of safetensors.
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
