"""How lm-eval asks: the options of its own command that change what a model reads, or how it answers."""
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, naming, nearest
from llmopt.files.shards import write_text
from llmopt.recipe.yaml_lines import read_yaml

# of what a generation takes, the kind and the bounds of the values that people set; lm-eval's own keys among them
NUMBERS = {"temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0, math.inf)}
COUNTS = {"max_gen_toks": 1, "max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0}
FLAGS = ("do_sample", "use_cache", "early_stopping")
OWN = ("until", "max_gen_toks")                         # keys that lm-eval takes out for itself
SLOTS = "one number for all, or four for Python, numpy, torch and few-shot examples, such as 0,1234,None,1234"


@dataclass(frozen=True)
class Asking:
    """The defaults are those of `llmopt eval`: every seed 0, and all else as the task has it.

    apply_chat_template: True, or the name of one. seeds: of Python, numpy, torch and the few-shot examples; None: not
    set. include_path: a folder of tasks beside lm-eval's own. log_samples: keep every question with its answer.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int | None, ...] = (0, 0, 0, 0)
    include_path: str | None = None
    log_samples: bool = False

    def changed(self) -> dict[str, Any]:
        """What a score depends on and is not at its default, as plain JSON: part of a kept score's key."""
        default = asdict(Asking())
        found = {key: value for key, value in asdict(self).items() if value != default[key] and key != "log_samples"}
        return found | ({"seeds": list(self.seeds)} if "seeds" in found else {})

    def arguments(self) -> dict[str, Any]:
        """The keywords of lm-eval's `simple_evaluate`."""
        kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        return {"num_fewshot": self.num_fewshot, "apply_chat_template": self.apply_chat_template,
                "fewshot_as_multiturn": self.fewshot_as_multiturn, "system_instruction": self.system_instruction,
                "gen_kwargs": dict(self.gen_kwargs) or None, "log_samples": self.log_samples,
                **dict(zip(kinds, self.seeds, strict=True))}


def check_asking(asking: Asking, trust: bool) -> None:
    """Raise LlmoptError for options that contradict each other, or that let code run without leave."""
    folder = asking.include_path
    if folder is not None and not Path(folder).is_dir():
        raise LlmoptError(f"--include_path {folder}: is no folder")
    if folder is not None and not trust:
        raise LlmoptError(f"--include_path {folder}: tasks of a folder can run code of their own; read them, and if "
                          "you trust them give --trust-remote-code on the command line")


def check_templates(asking: Asking, tokenizer: Any, model: str) -> None:
    """Raise LlmoptError where the chat template that is asked for is none of the tokenizer's."""
    template = tokenizer.chat_template
    if not asking.apply_chat_template:
        return
    if not template:
        raise LlmoptError(f"--apply_chat_template: {model} has no chat template")
    name = asking.apply_chat_template
    known = template if isinstance(template, dict) else {}
    if isinstance(name, str) and name not in known:
        raise LlmoptError(f"--apply_chat_template {name}: {model} has " + (
            f"no template of that name{nearest(name, known)}" if known else "one template, without a name"))
    if name is True and known and "default" not in known:
        raise LlmoptError(f"--apply_chat_template: {model} has several, none called default; name one of "
                          f"{', '.join(sorted(known))}")


def generation(given: tuple[str, ...]) -> dict[str, Any]:
    """The keywords in `temperature=0.7,do_sample=true`, or a JSON object; values are read as YAML.

    Raises LlmoptError for a key that generation does not know, and for values of another kind.
    """
    from transformers import GenerationConfig

    found = {key: value for text in given for key, value in _pairs(text).items()}
    known = [key for key in GenerationConfig().to_dict() if not key.startswith("_")]
    for key, value in found.items():
        if key not in known and key not in OWN:
            raise LlmoptError(f"--gen_kwargs: {key!r} is nothing that generation knows{nearest(key, [*known, *OWN])}")
        if expected := _misfit(key, value):
            raise LlmoptError(f"--gen_kwargs {key}: {value!r} given, {expected} expected")
    return found


def _pairs(text: str) -> dict[str, Any]:
    """{key: value} of one --gen_kwargs; a comma that no key follows belongs to the value before it."""
    with naming(f"--gen_kwargs {text}"):
        if text.lstrip().startswith("{"):
            found = read_yaml(text, "value")[0]
            if isinstance(found, dict):
                return found
        words = [word.partition("=") for word in re.split(r",(?=\s*\w+\s*=)", text)]
        if not all(sign for _, sign, _ in words):
            raise LlmoptError("KEY=VALUE,KEY=VALUE expected, such as temperature=0.7,do_sample=true")
        return {key.strip(): read_yaml(value, "value")[0] for key, _, value in words}


def _misfit(key: str, value: Any) -> str | None:
    """The kind of value that `key` takes, if this is of another; None if it fits, or if nothing is known."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in NUMBERS and not (number and NUMBERS[key][0] <= value <= NUMBERS[key][1]):
        low, high = NUMBERS[key]
        return f"a number from {low}" + (f" to {high}" if high < math.inf else "")
    if key in COUNTS and not (isinstance(value, int) and number and value >= COUNTS[key]):
        return f"a whole number from {COUNTS[key]}"
    if key in FLAGS and not isinstance(value, bool):
        return "true or false"
    if key == "until" and not (isinstance(value, str) or (isinstance(value, list) and all(
            isinstance(part, str) for part in value))):
        return "text, or a list of texts"
    return None


def seeds(text: str) -> tuple[int | None, ...]:
    """The four seeds in lm-eval's form; raises LlmoptError for any other."""
    words = [word.strip() for word in text.split(",")]
    if len(words) not in (1, 4) or not all(re.fullmatch(r"\d{1,9}|None", word) for word in words):
        raise LlmoptError(f"--seed: {text!r} given, {SLOTS} expected")
    found = tuple(None if word == "None" else int(word) for word in words)
    return found * 4 if len(found) == 1 else found


def sample_file(output: Path, task: str) -> Path:
    """Where the questions and answers of one task go, beside the file of results."""
    return output.with_name(f"{output.stem}.{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl")


def write_samples(results: dict[str, Any], output: Path) -> list[Path]:
    """Write every question with its answer, a line each; the files, one for each task."""
    from lm_eval.utils import handle_non_serializable

    files = []
    for task, rows in results.get("samples", {}).items():
        lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) + "\n" for row in rows)
        files.append(sample_file(output, task))
        write_text(files[-1], "".join(lines))
    return files
