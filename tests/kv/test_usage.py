"""A checkpoint with a cache method as a user has it: plain from_pretrained, generate, pipeline, conversations."""
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import llmopt
from llmopt import kv, runtime
from llmopt.method import Run
from llmopt.runtime import Attachment
from tests import tiny

BUDGET, NEW = 16, 6
LINES = ["the old mill stands by the river, and its wheel has not turned for so many years now that grass grows on it",
         "a line about the sea and the gulls above it, and about a boat that came back from it at night",
         "in the town they say that the miller went away one night, and that he left all of his flour behind for the "
         "mice, who have lived there ever since and are said to be as large as cats"]
CHAT = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose cache keeps BUDGET entries, with a tokenizer that can chat."""
    place, tokenizer = tmp_path_factory.mktemp("usage") / "out", tiny.tokenizer(LINES)
    tokenizer.chat_template = CHAT
    model = tiny.make("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    llmopt.compress(model, kv.SnapKV(budget=BUDGET, window=4, allocate="ada"))
    llmopt.save(model, place, tokenizer=tokenizer)
    return place


@pytest.fixture
def caches(monkeypatch):
    """Every cache that a model brings from now on."""
    made, new = [], Attachment.new_cache

    def watched(live):
        made.append(new(live))
        return made[-1]

    monkeypatch.setattr(Attachment, "new_cache", watched)
    return made


def mean_kept(cache) -> float:
    """Entries per KV head and row, without those of padding."""
    rows = [layer.row(row, cache.real(row)).counts for layer in cache.layers for row in range(cache.batch_size)]
    return float(torch.stack(rows).float().mean())


def prompts(tokenizer, lines: list[str]) -> dict:
    found = tokenizer(lines, return_tensors="pt", padding=True, padding_side="left")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 1}, {"num_beams": 3}], ids=str)
def test_generate_compresses_a_batch_of_unequal_lengths(folder, how):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    how = dict(max_new_tokens=NEW, return_dict_in_generate=True, pad_token_id=0) | how
    given = prompts(tokenizer, LINES)
    out = model.generate(**given, **how)
    assert given["attention_mask"].sum(1).min() > BUDGET
    assert mean_kept(out.past_key_values) == BUDGET + NEW - 1         # the last token that is written is never read
    for row, line in enumerate(LINES):
        alone = model.generate(**prompts(tokenizer, [line]), **how)
        assert torch.equal(out.sequences[row, -NEW:], alone.sequences[0, -NEW:])
    runtime.detach(model)
    assert not torch.equal(model.generate(**given, **how).sequences, out.sequences)


def test_a_pipeline_compresses_strings_lists_chats_and_batches(folder, caches):
    write = pipeline("text-generation", model=str(folder))
    model, tokenizer = write.model, write.tokenizer
    how = dict(max_new_tokens=NEW, do_sample=False)
    chats = [[{"role": "user", "content": line}] for line in LINES]
    asked = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]

    def answers(texts: list[str]) -> list[str]:
        rows = [model.generate(**prompts(tokenizer, [text]), **how)[0, -NEW:] for text in texts]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    plain, spoken = answers(LINES), answers(asked)
    caches.clear()
    assert write(LINES[0], return_full_text=False, **how)[0]["generated_text"] == plain[0]
    assert [one[0]["generated_text"] for one in write(LINES, return_full_text=False, **how)] == plain
    assert [one[0]["generated_text"] for one in write(LINES, return_full_text=False, batch_size=3, **how)] == plain
    assert write(chats[0], **how)[0]["generated_text"][-1] == {"role": "assistant", "content": spoken[0]}
    assert [one[0]["generated_text"][-1]["content"] for one in write(chats, batch_size=2, **how)] == spoken
    assert len(caches) == 1 + 3 + 1 + 1 + 2
    assert [mean_kept(cache) for cache in caches] == [BUDGET + NEW - 1] * len(caches)


@pytest.mark.parametrize("given", [{"budget": BUDGET}, {"ratio": 0.75}], ids=str)
def test_a_conversation_keeps_its_budget(given):
    """Each turn is compressed when it has been read; a ratio is of all that was said so far."""
    model, texts, cache, seen, held = tiny.make("llama"), tiny.ids(3, 30), None, 0, []
    mask = torch.ones(1, 0, dtype=torch.long)
    ids = mask.clone()
    with runtime.attached(model, kv.SnapKV(window=4, **given)):
        for turn in range(3):
            ids, mask = torch.cat([ids, texts[turn:turn + 1]], 1), torch.ones(1, ids.shape[1] + 30, dtype=torch.long)
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, pad_token_id=0,
                                 eos_token_id=None, return_dict_in_generate=True)
            seen, ids, cache = ids.shape[1], out.sequences, out.past_key_values
            held.append(mean_kept(cache))
            kept = BUDGET if "budget" in given else seen - int(0.75 * seen)
            assert held[-1] == kept + NEW - 1 and cache.get_seq_length() == seen + NEW - 1
    assert (held[0] == held[2]) == ("budget" in given)


def test_a_conversation_of_unequal_rows_is_what_each_row_says_alone(folder):
    """Padding stands before every turn of the shorter row, not only before the first."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = tiny.ids(2, 30), tiny.ids(2, 14, seed=9)
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[1, :8] = mask[1, 30:35] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)              # as generate counts them
    with torch.no_grad():
        cache = model(first, attention_mask=mask[:, :30], position_ids=places[:, :30], use_cache=True).past_key_values
        both = model(second, attention_mask=mask, position_ids=places[:, 30:], past_key_values=cache).logits
        alone = model(first[1:, 8:], use_cache=True).past_key_values
        want = model(second[1:, 5:], past_key_values=alone).logits
    assert_close(both[1, 5:], want[0], atol=1e-4, rtol=1e-4)
    assert mean_kept(cache) == BUDGET


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("allocate", ["uniform", "ada", "global", "prefix", "pyramid", "heads"])
@torch.no_grad()
def test_short_turns_take_nothing_from_the_budget_of_uneven_heads(allocate, family):
    """A head that was left few entries cannot have an even share of the next turn's: the others have it then."""
    model, cache = tiny.make(family, **({"sliding_window": 40} if family == "mistral" else {})), None
    heads = {"allocate": "heads", "heads": "s"} if allocate == "heads" else {"allocate": allocate}
    run = Run(scores={"s": [torch.tensor([0.0, 0, 5, 1]), torch.tensor([3.0, 0, 0, 0]), torch.ones(4)]})
    with runtime.attached(model, kv.SnapKV(budget=BUDGET, window=4, minimum=4, **heads), run=run):
        for turn, size in enumerate((60, 4, 9, 3)):
            cache = model(tiny.ids(2, size, turn), past_key_values=cache, use_cache=True).past_key_values
            assert mean_kept(cache) == BUDGET
