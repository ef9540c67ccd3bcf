"""Calibration batches from what a program has at hand: texts, conversations, token ids, batches, loaders, datasets."""
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from llmopt.calibration.data import DEFAULT_LENGTH, Batch, as_batches
from llmopt.calibration.sources import MAX_TOKENS, is_message, tokenised
from llmopt.errors import LlmoptError
from llmopt.specs import MAX_SAMPLES, DataSpec

IDS, MASK = "input_ids", "attention_mask"
COLUMNS = (IDS, "messages", "text")         # of a datasets.Dataset; the first that it has is read
EXPECTED = ("texts, conversations (lists of {role, content}), token ids [N, T], a list of lists of ids, batches "
            "{input_ids, attention_mask}, a DataLoader or a datasets.Dataset expected")


def batches_of(anything: Any, tokenizer: Any, config: Any, length: int | None = None,
               batch_size: int = 8) -> list[Batch]:
    """Batches {"input_ids", "attention_mask"} [B, T], right-padded, from anything that holds tokens or text.

    anything: a text or several; conversations, for the chat template; ids as a tensor, array or lists, one row or many;
    a batch as a tokenizer returns it, with tensors or without, or several; a DataLoader, also of (ids, mask) or (ids,
    labels) tuples; a datasets.Dataset with a column input_ids, messages or text. All items must be of one kind.
    tokenizer: the model's; None if no text is given. config: the model's. length: tokens of a row made of text, long
    texts make several (None: 512, or the model's maximum); rows of ids stay whole. batch_size: rows of a batch.
    Raises LlmoptError, in one line, for anything else, and for ids that the model's vocabulary does not hold.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_LENGTH)
    items = _limited(_items(anything))
    if not items:
        raise LlmoptError(f"the data are empty; {EXPECTED}")
    kinds = {_kind(item) for item in items}
    if len(kinds) > 1:
        raise LlmoptError(f"the data hold {' and '.join(sorted(kinds))}; all items must be of one kind")
    if kinds <= {"texts", "conversations"}:
        rows = _tokenised(items, tokenizer, length or min(DEFAULT_LENGTH, limit))
    else:
        rows = [row for item in items for row in _rows(item)]
    if (longest := max(map(len, rows), default=0)) > limit:
        raise LlmoptError(f"a row has {longest:,} tokens, but the model reads at most {limit:,}")
    return as_batches([row for row in rows if len(row) > 1], config.get_text_config().vocab_size, batch_size)


def _items(anything: Any) -> Iterable[Any]:
    """The texts, conversations, rows or batches, one after the other."""
    library = sys.modules.get("datasets")           # who has a dataset has imported it
    if library and isinstance(anything, (library.DatasetDict, library.IterableDatasetDict)):
        raise LlmoptError(f"a DatasetDict has the splits {', '.join(map(str, anything))}; give one of them, such as "
                          f"data[{next(iter(anything), 'train')!r}]")
    if library and isinstance(anything, (library.Dataset, library.IterableDataset)):
        return _records(anything)
    one = isinstance(anything, (str, Mapping, Tensor)) or _is_array(anything) or _is_row(anything) or _is_talk(anything)
    if not one and (isinstance(anything, (bytes, type)) or not isinstance(anything, Iterable)):
        raise LlmoptError(f"{EXPECTED}, {str(anything)[:60]!r} given")
    return [anything] if one else anything


def _records(dataset: Any) -> Iterator[Any]:
    """What the records hold under the first of COLUMNS that is there; ids with their mask."""
    columns = dataset.column_names or list(next(iter(dataset), {}))       # a streamed one may not know its columns
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise LlmoptError(f"the dataset has the columns {', '.join(columns) or 'none'}; one of {', '.join(COLUMNS)} "
                          "is needed (dataset.rename_column)")
    return (record if column == IDS else record[column] for record in dataset)


def _limited(items: Iterable[Any]) -> list[Any]:
    """All items; raises LlmoptError where they do not come to an end."""
    found, tokens = [], 0
    for item in items:
        found.append(item)
        ids = item.get(IDS) if isinstance(item, Mapping) else item
        tokens += ids.numel() if isinstance(ids, Tensor) else 1
        if tokens > MAX_TOKENS or len(found) > MAX_SAMPLES:
            raise LlmoptError(f"more than {MAX_TOKENS:,} tokens or {MAX_SAMPLES:,} items; give fewer, such as "
                              "itertools.islice(data, 100)")
    return found


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "texts"
    if _is_talk(item):
        return "conversations"
    if isinstance(item, (Mapping, Tensor, list, tuple)) or _is_array(item):
        return "token ids"
    raise LlmoptError(f"{EXPECTED}, {str(item)[:60]!r} given")


def _is_talk(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_message, value))


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(token) is int for token in value)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _tokenised(items: list, tokenizer: Any, length: int) -> list[list[int]]:
    if tokenizer is None:
        raise LlmoptError("texts need the model's tokenizer, and there is none; give tokenizer=, or token ids")
    template = "chat" if _is_talk(items[0]) else None
    whole = [item if isinstance(item, str) else list(item) for item in items]
    return tokenised(whole, DataSpec(name="text", path="-", template=template, samples=len(items)), length, tokenizer)


def _rows(item: Any) -> list[list[int]]:
    """The rows of a batch, a tensor, an array or lists, without what a mask leaves out."""
    if isinstance(item, Mapping):
        if IDS not in item:
            raise LlmoptError(f"a batch needs input_ids; this one has {', '.join(map(str, item)) or 'nothing'}")
        return _unmasked(item[IDS], item.get(MASK))
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor) and item[0].ndim:
        return _unmasked(item[0], next((other for other in item[1:2] if _is_mask(other, item[0])), None))
    return _unmasked(item, None)


def _is_mask(other: Any, ids: Tensor) -> bool:
    return isinstance(other, Tensor) and other.shape == ids.shape and bool(((other == 0) | (other == 1)).all())


def _unmasked(ids: Any, mask: Any) -> list[list[int]]:
    rows, kept = _listed(ids, "input_ids"), None if mask is None else _listed(mask, "attention_mask")
    if kept is None:
        return rows
    if [len(row) for row in rows] != [len(row) for row in kept]:
        raise LlmoptError("attention_mask and input_ids of a batch are not of one shape")
    return [[token for token, keep in zip(row, keeps, strict=True) if keep] for row, keeps in
            zip(rows, kept, strict=True)]


def _listed(value: Any, what: str) -> list[list[int]]:
    """Rows of whole numbers from a tensor or array of one or two axes, or from lists."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        raise LlmoptError(f"{what} are {str(value.dtype).removeprefix('torch.')}; token ids are integers")
    plain = value.tolist() if isinstance(value, Tensor) or _is_array(value) else value
    rows = [plain] if isinstance(plain, (list, tuple)) and not any(isinstance(row, (list, tuple, Tensor)) for row in
                                                                   plain) else plain
    rows = [row.tolist() if isinstance(row, Tensor) or _is_array(row) else row for row in rows]
    if not all(isinstance(row, (list, tuple)) and all(isinstance(token, int) for token in row) for row in rows):
        raise LlmoptError(f"{what}: token ids [N, T] expected, {str(value)[:60]!r} given")
    return [list(map(int, row)) for row in rows]
