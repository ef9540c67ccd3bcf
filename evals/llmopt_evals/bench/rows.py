"""The rows of tokens of a bench: those that every tool is given to calibrate with, and others that are scored."""
import json
from pathlib import Path

from llmopt.calibration import data
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_dense
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals.pairs import draw


def rows_of(model: str, given: DataSpec, scored: DataSpec, count: int, work: Path) -> tuple[Path, list[data.Batch]]:
    """(a file in `work` with the rows of `given` that all tools read, `count` rows of `scored` that none has seen).

    The first are those of the full length, as a peer leaves out shorter ones.
    """
    dense, tokenizer = load_dense(ModelSpec(id=model))
    batches = data.load(given, dense.config, tokenizer, Sampler(dense, tokenizer))
    full = [ids for batch in batches for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"],
                                                          strict=True)
            if int(mask.sum()) == given.length]
    if not full:
        raise LlmoptError(f"data ({given.name}): no row has {given.length} tokens; all tools are given rows of one "
                          "length")
    ids = work / f"ids-{data.fingerprint(batches)[:8]}.jsonl"
    ids.write_text("".join(f"{json.dumps(row)}\n" for row in full))
    return ids, draw(scored, count)(dense, tokenizer)
