"""What can be wrong with the files of a model's folder, found before any weight is read: one clear line each."""
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from llmopt.errors import LlmoptError

# A model of a thousand experts has 300,000 tensors, a large tokenizer 2 million values; what is read takes below 1 GB.
MAX_HEADER, MAX_JSON, MAX_VALUES, MAX_TENSORS = 100_000_000, 100_000_000, 4_000_000, 400_000      # the first two: bytes
MAX_CONFIG = 500_000                                # values of a config.json, which transformers copies many times
MAX_ADDED = 20_000                                  # tokens beside the vocabulary; Gemma 3 has 6,000
MAX_COUNTED = {"layer": 1_000, "label": 100_000}    # keys of a config with these words make as many objects
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WORK = ".llmopt-work"                               # behind the name of an output: where a run keeps unfinished work
COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OURS = ("llmopt", "llmopt_kernels", "llmopt_evals")
CONVERT = 'python -c "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r}).save_pretrained(NEW)"'


def check_folder(folder: Path) -> None:
    """Raise LlmoptError for a folder that is no model: no config, a missing, truncated or foreign weight file."""
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        unfinished = folder.name.endswith(WORK)
        raise LlmoptError(f"{folder}: no config.json; this is " + (
            f"an adapter: give its model, and --adapter {folder} (adapter: in a recipe)" if adapter else
            "the unfinished work of llmopt compress, which --resume goes on with" if unfinished else
            "not a model folder"))
    config = check_config(file)
    for place in folder.iterdir():
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise LlmoptError(f"{place}: is a device, socket or FIFO, where a file is to be")
    for name in COMPANIONS:
        if (folder / name).is_file():
            _check_added(read_json(folder / name), folder / name)
    tensors = 0
    for shard in weight_files(folder):
        tensors += len(check_safetensors(shard))
        if tensors > MAX_TENSORS:
            raise LlmoptError(f"{shard}: more than {MAX_TENSORS:,} tensors in the folder; no model has as many")
    for key, value in counted(config, "layer"):
        if key in LAYERS and value > tensors:
            raise LlmoptError(f"{file}: {key} is {value:,}, but the weight files hold {tensors:,} tensors")


def _check_added(content: dict[str, Any], file: Path) -> None:
    """Raise LlmoptError for more added tokens than any model has; a tokenizer takes a while for each of them."""
    for key, value in content.items():
        if ("added_tokens" in key or "special_tokens" in key) and isinstance(value, (list, dict)) and \
                len(value) > MAX_ADDED:
            raise LlmoptError(f"{file}: {key} has {len(value):,} entries; at most {MAX_ADDED:,} are read")


def read_json(file: Path, most: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON mapping; raises LlmoptError for a file that is missing or holds anything else."""
    content = load_json(file, most)
    if not isinstance(content, dict):
        raise LlmoptError(f"{file}: not a JSON mapping")
    return content


def load_json(file: Path, most: int = MAX_VALUES) -> Any:
    """The content of a JSON file; raises LlmoptError for one that is missing, too large or damaged."""
    try:
        if not file.is_file():
            raise LlmoptError(f"{file}: " + ("is not a file" if file.exists() else "there is no such file"))
        if file.stat().st_size > MAX_JSON:
            raise LlmoptError(f"{file}: {file.stat().st_size:,} bytes are too many for JSON")
        return parse_json(file.read_bytes(), str(file), most)
    except OSError as error:
        raise LlmoptError(f"{file}: cannot be read: {error.strerror}") from error


def parse_json(text: str | bytes, where: str, most: int = MAX_VALUES) -> Any:
    """The data in a JSON text; raises LlmoptError for no JSON, no UTF-8, half characters, deep nesting, endless digits.

    Values are counted before one is made: a list of three bytes takes sixty.
    """
    signs = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(map(text.count, signs)) > most:
        raise LlmoptError(f"{where}: more than {most:,} values; too many for a model's file")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()      # a whole pair passes, a half could never be written
        return content
    except (ValueError, RecursionError) as error:
        raise LlmoptError(f"{where}: not JSON: {fact_of(error)}") from error


def check_config(file: Path) -> dict[str, Any]:
    """The content of config.json; raises LlmoptError for sizes no model has, and for choices that are not its own.

    Both are looked at before transformers reads the file: it makes one object for each layer and label, fetches an
    attention kernel that the file names from the hub, and opens whatever weight file is named, a pickled one too.
    """
    config = read_json(file, MAX_CONFIG)
    _check_counts(config, file)
    if "transformers_weights" in config:
        raise LlmoptError(f"{file}: transformers_weights chooses the weight file; remove this key")
    for key, value in config.items():
        if "attn_implementation" in key and "/" in str(value):
            raise LlmoptError(f"{file}: {key} names code of the hub, {str(value)[:80]!r}; remove this key")
    return config


def check_bounds(folder: Path) -> None:
    """Raise LlmoptError for sizes that no model has, in whatever is there; all else transformers finds by itself."""
    if (folder / "config.json").is_file():
        _check_counts(read_json(folder / "config.json", MAX_CONFIG), folder / "config.json")
    for index in folder.glob("*.safetensors.index.json"):
        indexed(index)
    tensors = sum(len(read_header(file)[0]) for file in folder.glob("*.safetensors") if file.is_file())
    if tensors > MAX_TENSORS:
        raise LlmoptError(f"{folder}: {tensors:,} tensors; no model has more than {MAX_TENSORS:,}")


def _check_counts(config: dict[str, Any], file: Path) -> None:
    own = config.get("llmopt")
    declared = own.get("tensors") if isinstance(own, dict) else None
    if isinstance(declared, (dict, list)) and len(declared) > MAX_COUNTED["layer"] * 10:
        raise LlmoptError(f"{file}: llmopt.tensors has {len(declared):,} entries; no method needs as many")
    for word, limit in MAX_COUNTED.items():
        for key, value in counted(config, word):
            if value > limit:
                raise LlmoptError(f"{file}: {key} is {value:,}; at most {limit:,} are read")
        for key, value in config.items():
            if word in key and isinstance(value, (dict, list)) and len(value) > limit:
                raise LlmoptError(f"{file}: {key} has {len(value):,} entries; at most {limit:,} are read")


def counted(config: dict[str, Any], word: str) -> Iterator[tuple[str, float]]:
    """(key, number) for every numeric entry, at any depth, whose key holds `word`."""
    pending: list[Any] = [config]
    while pending:
        item = pending.pop()
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            if isinstance(value, (dict, list)):
                pending.append(value)
            elif isinstance(value, (int, float)) and word in str(key):
                yield key, value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would open, in order; raises LlmoptError for a missing or foreign one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    _refuse_dangling(single)
    if single.is_file():
        return [single]
    if not index.is_file():
        raise LlmoptError(f"{folder}: no model.safetensors{_other_format(folder)}")
    files = []
    for name in indexed(index):
        if os.sep in name or "\0" in name or not name.endswith(".safetensors"):
            raise LlmoptError(f"{index}: {name!r} is not a file of this folder")
        _refuse_dangling(folder / name)
        if not (folder / name).is_file():
            raise LlmoptError(f"{folder / name}: listed in the index and missing; fetch this shard again")
        files.append(folder / name)
    return files


def indexed(index: Path) -> list[str]:
    """The names of the weight files that an index lists, whatever they are, in order."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise LlmoptError(f"{index}: not a safetensors index: weight_map, {{tensor: file}}, is missing")
    if len(shards) > MAX_TENSORS:
        raise LlmoptError(f"{index}: lists {len(shards):,} tensors; no model has more than {MAX_TENSORS:,}")
    return sorted(set(map(str, shards.values())))


def _refuse_dangling(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise LlmoptError(f"{file}: a link to {os.readlink(file)}, which is not there; fetch this file again")


def _other_format(folder: Path) -> str:
    """A hint about weights that are there, but in a format that is not read."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            return (f"; {file.name} is pickled and may run code when it is opened. If you trust it, convert it: "
                    + CONVERT.format(str(folder)))
        if file.suffix in (".gguf", ".onnx", ".h5", ".msgpack", ".safetensors"):
            return f"; {file.name} is not read: take the model's original safetensors"
    return ""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(name -> {dtype, shape, data_offsets}, bytes in front of the values) of a safetensors file."""
    with file.open("rb") as stream:
        start = stream.read(8)
        size, actual = int.from_bytes(start, "little") if len(start) == 8 else 0, file.stat().st_size
        if not 2 <= size <= MAX_HEADER or size + 8 > actual:
            raise LlmoptError(f"{file}: not a safetensors file (its header claims {size:,} bytes, the file has "
                              f"{actual:,})")
        header = parse_json(stream.read(size), f"{file}: its safetensors header")
    if not isinstance(header, dict):
        raise LlmoptError(f"{file}: its safetensors header is not a mapping")
    header.pop("__metadata__", None)
    return header, size + 8


def check_safetensors(file: Path) -> dict[str, Any]:
    """The header; raises LlmoptError if the file's length is not what it promises, or an entry lacks a part."""
    header, start = read_header(file)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise LlmoptError(f"{file}: {name!r} in the safetensors header lacks shape, dtype or data_offsets")
    promised = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    actual = file.stat().st_size
    if promised != actual:
        raise LlmoptError(f"{file}: header says {promised:,} bytes, the file has {actual:,}. "
                          "The download was cut off; fetch this shard again.")
    return header


def _is_entry(entry: Any) -> bool:
    """True for {dtype: name, shape: [n, ...], data_offsets: [start, end]}; safetensors checks how they fit."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets))
    return numbers and len(offsets) == 2


@contextmanager
def refusals(what: str, ours: bool = True) -> Iterator[None]:
    """Every way in which a library refuses a foreign file becomes one line; tokenizers raises bare exceptions.

    ours: False for work that our own code takes part in: an error that is raised there stays what it is.
    """
    try:
        yield
    except LlmoptError:
        raise
    except Exception as error:
        *_, (last, _) = walk_tb(error.__traceback__)
        if not ours and last.f_globals["__name__"].partition(".")[0] in OURS:
            raise
        raise LlmoptError(f"{what}: {fact_of(error)}") from error


@contextmanager
def panics() -> Iterator[None]:
    """A panic of Rust, by which tokenizers ends some texts and which is no Exception, becomes one line."""
    try:
        yield
    except BaseException as error:      # noqa: BLE001
        if type(error).__name__ != "PanicException":
            raise
        raise LlmoptError(f"the tokenizer breaks down: {fact_of(error)}") from error


def fact_of(error: BaseException) -> str:
    """The first line of a message, with the next where it ends in a colon; a bare key says that it is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which runs only with --trust-remote-code; read that code first"
    if isinstance(error, KeyError):
        return f"unknown or missing key {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
