"""What the user can mend: one exception family, and how a short fact gains place and nearest choice on its way out."""
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")
ELSEWHERE = {       # fields, arguments and functions -> what other tools call them
    "act_order": "desc_act actorder",
    "attached": "attach press",
    "batch_size": "calibration_batch_size per_device_eval_batch_size bs",
    "bits": "w_bit wbits w_bits num_bits nbits n_bits weight_bits bitwidth avg_bits q_bits load_in_4bit load_in_8bit",
    "budget": "max_capacity_prompt cache_size capacity cache_budget max_cache_size max_capacity",
    "compress": "quantize quantize_ oneshot convert apply optimize ptq prune_model quantize_and_save auto_quantize",
    "damping": "percdamp dampening_frac damp_percent damp percent_damp",
    "data": "dataset datasets calibration_dataset calibration_data calib_data calib_dataset examples train_dataset",
    "device": "device_map",
    "dtype": "torch_dtype compute_dtype bnb_4bit_compute_dtype weight_dtype",
    "evaluate": "eval eval_model simple_evaluate ppl perplexity",
    "folder": "pretrained_model_name_or_path model_path model_id model_name path",
    "group_size": "q_group_size groupsize blocksize block_size gs",
    "ignore": "modules_to_not_convert ignored_layers exclude skip_modules llm_int8_skip_modules exclude_modules",
    "length": "seqlen seq_len max_seq_length max_seq_len sequence_length",
    "limit": "num_samples max_samples",
    "load": "from_pretrained from_quantized load_model automodelforcausallm",
    "model": "model_id model_name model_name_or_path pretrained_model_name_or_path",
    "output": "output_dir save_dir save_path output_path save_directory mlx_path",
    "overrides": "layer_config config_groups dynamic quant_predicate",
    "ratio": "sparsity compression_ratio pruning_ratio sparsity_ratio amount",
    "samples": "num_calibration_samples nsamples n_samples num_samples calib_size",
    "save": "save_pretrained save_quantized export save_model save_compressed",
    "sinks": "n_sink num_sinks sink_size attention_sinks n_init",
    "steps": "recipe method methods modifier modifiers config quantization_config quantize_config",
    "symmetric": "sym is_symmetric",
    "window": "window_size local_window recent_size n_local",
}
LONGEST = 2000                 # characters of a message, a value or a list of choices included


def one_line(text: str) -> str:
    """`text` without line ends or terminal codes: names and values from foreign files may hold either."""
    text = text if len(text) <= 9 * LONGEST else f"{text[:5 * LONGEST]} ... {text[-3 * LONGEST:]}"
    line = " ".join(part.strip() for part in text.splitlines())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST * 3 // 4]} ... {line[-LONGEST // 4:]}"


class LlmoptError(ValueError):
    """Something the user can mend; its text is the whole message. Commands print it and exit with `exit_code`."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class FieldError(LlmoptError):
    """A field of a method holds a value that it cannot use. key: its path, such as `allocate.prefix.floor`."""

    def __init__(self, key: str, value: object, expected: str, tail: str = ""):
        super().__init__(f"{key}: {value!r} given, {expected} expected{tail}")
        self.key, self.value, self.expected, self.tail = key, value, expected, tail

    def below(self, path: str) -> "FieldError":
        """This error with the name of the field around its own in front."""
        return FieldError(f"{path}.{self.key}" if self.key else path, self.value, self.expected, self.tail)


class KeyUnknown(FieldError):
    """A key that its place does not have."""

    def __init__(self, key: str, tail: str):
        LlmoptError.__init__(self, f"unknown key {key!r}{tail}")
        self.key, self.tail = key, tail

    def below(self, path: str) -> "KeyUnknown":
        """This error with the name of the field around its own in front."""
        return KeyUnknown(f"{path}.{self.key}", self.tail)


class BudgetError(LlmoptError):
    """A total that no allocation can meet."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` in front of any short fact that is raised inside."""
    try:
        yield
    except LlmoptError as fact:
        raise LlmoptError(f"{where}: {fact}") from fact


def nearest(word: str, choices: Iterable[str]) -> str:
    """A tail for error messages: the closest valid choice, then all of them."""
    choices = sorted(choices)
    if not choices:
        return "; there are none"
    return f"{closest(word, choices)}. Choices: {', '.join(choices)}"


def closest(word: object, choices: Iterable[object]) -> str:
    """A tail for error messages: ` (did you mean 'bits'?)`, nothing where no choice is alike.

    A word that other tools use for one of the choices means that one.
    """
    words = [choice for choice in choices if isinstance(choice, str)]
    found = [choice for choice in words if str(word).lower() in ELSEWHERE.get(choice, "").split()]
    found = found or difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def naming_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a keyword that `function` does not have raises LlmoptError, which names the nearest that it has."""
    code = function.__code__
    known = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(function)
    def called(*args: P.args, **keywords: P.kwargs) -> T:
        for word in keywords:
            if word not in known:
                raise LlmoptError(f"{function.__name__}() has no argument {word!r}{nearest(word, known)}")
        return function(*args, **keywords)

    return called
