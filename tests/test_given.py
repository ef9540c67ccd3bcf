"""Calibration data as programs hold them: every kind makes the same batches, everything else is one line."""

import datasets
import numpy as np
import pytest
import torch
from llmopt_evals.world.tokenizer import build_tokenizer
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, LlamaConfig

from llmopt.calibration.given import batches_of
from llmopt.errors import LlmoptError
from tests import tiny
from tests.test_data import ROLES, rows_of

CONFIG = LlamaConfig(vocab_size=512, max_position_embeddings=128)
IDS = tiny.ids(5, 12)
LEFT = torch.tensor([[0, 0, 0, *[1] * 9]] * 5)              # padded on the left
TEXTS = ["the fox runs near the river .", "the bird sings in the forest ."]
TOKENIZER = build_tokenizer()


def given(anything, **more) -> list[list[int]]:
    return rows_of(batches_of(anything, TOKENIZER, CONFIG, **more))


WHOLE, CUT = IDS.tolist(), IDS[:, 3:].tolist()


@pytest.mark.parametrize(("anything", "rows"), [
    (IDS, WHOLE), (IDS[0], WHOLE[:1]), (IDS.numpy(), WHOLE), (IDS.to(torch.int32), WHOLE), (IDS.tolist(), WHOLE),
    (IDS[0].tolist(), WHOLE[:1]), (list(IDS), WHOLE), ([IDS[:2], IDS[2:]], WHOLE), (iter(list(IDS)), WHOLE),
    ({"input_ids": IDS}, WHOLE), (BatchEncoding({"input_ids": IDS, "attention_mask": LEFT}), CUT),
    (BatchEncoding({"input_ids": WHOLE, "attention_mask": LEFT.tolist()}), CUT),
    ({"input_ids": np.array(WHOLE), "attention_mask": LEFT.numpy()}, CUT),
    ([{"input_ids": IDS[:2], "attention_mask": LEFT[:2]}, {"input_ids": IDS[2:], "attention_mask": LEFT[2:]}], CUT),
    (DataLoader(TensorDataset(IDS), batch_size=2), WHOLE),
    (DataLoader(TensorDataset(IDS, LEFT), batch_size=2), CUT),
    (DataLoader(TensorDataset(IDS, IDS * LEFT), batch_size=2), WHOLE),
    (DataLoader(WHOLE, batch_size=2, collate_fn=torch.tensor), WHOLE),
    (DataLoader([{"input_ids": row} for row in IDS], batch_size=2), WHOLE),
    (datasets.Dataset.from_dict({"input_ids": WHOLE, "text": ["x"] * 5}), WHOLE),
    (datasets.Dataset.from_dict({"input_ids": WHOLE, "attention_mask": LEFT.tolist()}).with_format("torch"), CUT),
    (datasets.Dataset.from_dict({"input_ids": WHOLE}).to_iterable_dataset(), WHOLE),
])
def test_token_ids_in_every_form(anything, rows):
    assert given(anything) == rows


def test_rows_are_padded_on_the_right_and_grouped():
    batches = batches_of(BatchEncoding({"input_ids": IDS, "attention_mask": LEFT}), None, CONFIG, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 9), (2, 9), (1, 9)]
    ragged, = batches_of([[5, 6, 7], [8, 9]], None, CONFIG)
    assert ragged["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("anything", [
    TEXTS, tuple(TEXTS), (text for text in TEXTS), datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2]}),
    DataLoader(TEXTS, batch_size=None)])
def test_texts_in_every_form(anything):
    assert given(anything) == [TOKENIZER(text)["input_ids"] for text in TEXTS]
    assert given(TEXTS[0]) == [TOKENIZER(TEXTS[0])["input_ids"]]


def test_long_texts_make_several_rows():
    assert [len(row) for row in given("the fox " * 100, length=51)] == [51, 51, 51, 51]
    assert max(len(row) for row in given("the fox " * 100)) == CONFIG.max_position_embeddings


def test_conversations_go_through_the_chat_template():
    talk = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "runs"}]
    tokenizer, mute = build_tokenizer(), build_tokenizer()
    tokenizer.chat_template, mute.chat_template = ROLES, None
    wanted = tokenizer.apply_chat_template(talk)["input_ids"]
    for anything, count in ((talk, 1), ([talk, talk], 2), (datasets.Dataset.from_dict({"messages": [talk] * 3}), 3)):
        assert rows_of(batches_of(anything, tokenizer, CONFIG)) == [wanted] * count
    with pytest.raises(LlmoptError, match="no chat template"):
        batches_of(talk, mute, CONFIG)


def endless():
    while True:
        yield torch.zeros(1000, 1000, dtype=torch.long).expand(1000, 1000)


@pytest.mark.parametrize(("anything", "said"), [
    (5, "DataLoader or a datasets.Dataset expected, '5' given"), (None, "'None' given"), (b"the fox", "expected"),
    (torch.nn.Linear, "expected"), ([], "the data are empty"), ("", "no document"), ([["a", "b"]], "token ids"),
    ([TEXTS[0], [1, 2]], "texts and token ids; all items must be of one kind"), ([object()], "expected"),
    (IDS.float(), "float32; token ids are integers"), ({"input_ids": IDS.float()}, "token ids are integers"),
    ({"labels": IDS}, "a batch needs input_ids; this one has labels"),
    ({"input_ids": IDS, "attention_mask": LEFT[:, 1:]}, "not of one shape"),
    (IDS + 500, "does not fit the model's vocabulary of 512"), (torch.ones(2, 200, dtype=torch.long), "at most 128"),
    (torch.ones(2, 2, 2, dtype=torch.long), "token ids"),
    (datasets.Dataset.from_dict({"prompt": TEXTS}), "the columns prompt; one of input_ids, messages, text is needed"),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})), r"one of them, such as data\['train'\]"),
    (endless(), "itertools.islice"),
])
def test_anything_else_is_one_line(anything, said):
    with pytest.raises(LlmoptError, match=said):
        batches_of(anything, TOKENIZER, CONFIG)


def test_texts_without_a_tokenizer_say_so():
    with pytest.raises(LlmoptError, match="tokenizer"):
        batches_of(TEXTS, None, CONFIG)
