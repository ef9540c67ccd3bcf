"""The embedded world: a small language of stories, facts and questions generated from seeds, and a model trained on it.

`reference_path()` is a trained model, `calibration_ids()` text to calibrate on, `tasks_path()` the lm-eval tasks,
`split_context()` the rule that separates what a cache method may compress from what is asked of it afterwards.
"""

from .paths import reference_path, tasks_path
from .questions import probes, split_context
from .text import calibration_ids, calibration_text
from .words import speaks_world

__all__ = ["calibration_ids", "calibration_text", "probes", "reference_path", "speaks_world", "split_context",
           "tasks_path"]
