"""The tokenizer: an ordinary folder for AutoTokenizer, one token a word."""

from llmopt_evals.world import calibration_ids, reference_path
from llmopt_evals.world.tokenizer import save_tokenizer
from llmopt_evals.world.words import BOS, EOS, PAD, UNK, WORDS
from transformers import AutoTokenizer


def test_saved_tokenizer_loads_and_round_trips(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = calibration_ids(3, 200)[2, 1:].tolist()
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == [BOS, *ids]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_and_unknown_words():
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    assert len(tokenizer) == len(WORDS) == 512
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)
    assert tokenizer("mira has xylophone")["input_ids"][-1] == UNK
    assert tokenizer("tell <|endoftext|>")["input_ids"][-1] == EOS


def test_chat_template_uses_known_words():
    tokenizer = AutoTokenizer.from_pretrained(reference_path())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ask mira has"}])["input_ids"]
    assert UNK not in ids and len(ids) >= 5
