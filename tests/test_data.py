"""Calibration data: documents, padding, fingerprints, and input that cannot be used."""
import json

import pytest
import torch
from llmopt_evals.world.tokenizer import build_tokenizer

from llmopt import data
from llmopt.method import LlmoptError
from llmopt.recipe import DataSpec
from tests import tiny


class Config:
    vocab_size = 512
    max_position_embeddings = 128


def load(spec: DataSpec, tokenizer=None):
    return data.load(spec, Config, tokenizer or build_tokenizer())


def test_text_is_cut_into_documents_behind_bos(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("the fox runs .<|endoftext|>the bird sings in the forest .\n")
    batch, = load(DataSpec(name="text", path=str(file), length=6))
    bos = build_tokenizer().bos_token_id
    assert batch["input_ids"][:, 0].tolist() == [bos, bos]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6]
    assert batch["input_ids"][0, 5] == 0


def test_ids_come_whole_by_default_and_cut_when_asked(tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(json.dumps([5] * n) + "\n" for n in (3, 100, 7)))
    whole, = load(DataSpec(name="ids", path=str(file)))
    assert whole["attention_mask"].sum(1).tolist() == [3, 100, 7]
    cut, = load(DataSpec(name="ids", path=str(file), length=5))
    assert cut["attention_mask"].sum(1).tolist() == [3, 5, 5]


def test_the_world_is_deterministic_and_seeded():
    spec = DataSpec(samples=4, length=64)
    first, again, other = load(spec), load(spec), load(DataSpec(samples=4, length=64, seed=1))
    assert data.fingerprint(first) == data.fingerprint(again) != data.fingerprint(other)
    assert first[0]["input_ids"].shape == (4, 64)


def test_batches_split_rows():
    batches = data.as_batches(tiny.ids(10, 8), tiny.VOCABULARY, batch_size=4)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("text", "", "empty"),
    ("text", "   \n", "no document"),
    ("ids", "[1]\n[2]\n", "at least 2 tokens"),
    ("ids", "[1, 9999]\n", "9999 does not fit"),
    ("ids", '["a"]\n', "line 1 is not a list of token ids"),
    ("ids", "[1, 2\n", "line 1 is not JSON"),
    ("jsonl", '{"txt": "the fox"}\n', "no column 'text' (it has: txt)"),
])
def test_unusable_files_say_what_is_wrong(tmp_path, name, content, expected):
    file = tmp_path / ("d.jsonl" if name != "text" else "d.txt")
    file.write_text(content)
    with pytest.raises(LlmoptError) as caught:
        load(DataSpec(name="text" if name == "jsonl" else name, path=str(file)))
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_length_beyond_the_model_is_refused():
    with pytest.raises(LlmoptError, match="at most 128"):
        load(DataSpec(length=129))


def test_another_models_vocabulary_cannot_read_the_world():
    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(LlmoptError, match="calibration text of your own"):
        load(DataSpec(), Other())


def test_ids_above_the_vocabulary_are_refused():
    with pytest.raises(LlmoptError, match="vocabulary of 96"):
        data.as_batches(torch.full((1, 4), 96), 96)
