"""Calibration data: documents, padding, fingerprints, and input that cannot be used."""
import json
from dataclasses import replace

import pytest
import torch
from llmopt_evals.world.tokenizer import build_tokenizer

from llmopt.calibration import data, hub
from llmopt.calibration.sampling import Sampler
from llmopt.errors import LlmoptError
from llmopt.specs import BY_NAME, DataSpec
from tests import tiny
from tests.command import call


class Config:
    vocab_size = 512

    @classmethod
    def get_text_config(cls):
        return cls
    max_position_embeddings = 128


def load(spec: DataSpec, tokenizer=None):
    return data.load(spec, Config, tokenizer or build_tokenizer())


def test_text_is_cut_into_documents_behind_bos(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("the fox runs .<|endoftext|>" + "the bird sings in the forest .\n" * 9)
    batch, = load(DataSpec(name="text", path=str(file), length=30))
    bos = build_tokenizer().bos_token_id
    assert batch["input_ids"][:, 0].tolist() == [bos, bos, bos]
    assert batch["attention_mask"].sum(1).tolist() == [5, 30, 30]
    assert batch["input_ids"][0, 5] == 0


def test_a_long_document_becomes_rows_after_the_first_rows_of_the_others(tmp_path):
    file = tmp_path / "t.txt"
    words = ["fox", "bird", "river", "forest"] * 25                                       # 100 tokens
    file.write_text(" ".join(words) + "<|endoftext|>the fox runs .<|endoftext|>" + " ".join(words[:45]))
    tokenizer = build_tokenizer()
    batch, = load(DataSpec(name="text", path=str(file), length=41))
    bos, text = tokenizer.bos_token_id, tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    rows = [row[:n].tolist() for row, n in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)]
    assert [len(row) for row in rows] == [41, 5, 41, 41]         # rests of 20 and 5 tokens are left out
    assert all(row[0] == bos for row in rows)
    assert rows[0][1:] + rows[3][1:] == text[:80] and rows[2][1:] == text[:40]
    few, = load(DataSpec(name="text", path=str(file), length=41, samples=3))
    assert torch.equal(few["input_ids"], batch["input_ids"][:3])
    short = load(DataSpec(name="text", path=str(file), length=11))
    assert data.amount(short) == {"samples": 15, "tokens": 10 * 11 + 5 + 4 * 11}


def test_a_byte_order_mark_and_odd_line_ends_are_no_part_of_the_text(tmp_path):
    plain, odd = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [json.dumps({"text": "the fox runs . " * n + "\u2028"}, ensure_ascii=False) for n in (4, 5)]
    plain.write_text("\n".join(lines), encoding="utf-8")
    odd.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    first, second = (load(DataSpec(name="text", path=str(file))) for file in (plain, odd))
    assert data.fingerprint(first) == data.fingerprint(second)
    assert first[0]["attention_mask"].sum(1).tolist() == [17, 21]


def test_ids_come_whole_by_default_and_cut_when_asked(tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(json.dumps([5] * n) + "\n" for n in (3, 100, 7)))
    whole, = load(DataSpec(name="ids", path=str(file)))
    assert whole["attention_mask"].sum(1).tolist() == [3, 100, 7]
    cut, = load(DataSpec(name="ids", path=str(file), length=25))
    assert cut["attention_mask"].sum(1).tolist() == [3, 25, 7]


def test_the_world_is_deterministic_and_seeded():
    spec = DataSpec(name="world", samples=4, length=64)
    first, again, other = load(spec), load(spec), load(DataSpec(name="world", samples=4, length=64, seed=1))
    assert data.fingerprint(first) == data.fingerprint(again) != data.fingerprint(other)
    assert first[0]["input_ids"].shape == (4, 64)


def test_shifts_turn_each_row_by_equal_parts(tmp_path):
    """Rows of other lengths in parts as equal as can be; held-out rows are not turned."""
    file = tmp_path / "ids.jsonl"
    file.write_text("\n".join(map(str, [list(range(3, 11)), list(range(20, 47)), list(range(3, 40))])))
    spec = DataSpec(name="ids", path=str(file), samples=2, shifts=4)
    found = rows_of(load(spec))
    assert found[:4] == [[3, 4, 5, 6, 7, 8, 9, 10], [9, 10, 3, 4, 5, 6, 7, 8], [7, 8, 9, 10, 3, 4, 5, 6],
                         [5, 6, 7, 8, 9, 10, 3, 4]]
    assert [row[0] for row in found[4:]] == [20, 41, 34, 27] and all(sorted(row) == found[4] for row in found[4:])
    assert rows_of(data.held_out(spec, None, tiny.make("llama"), 1, 40)) == [list(range(3, 40))]


def test_batches_split_rows():
    batches = data.as_batches(tiny.ids(10, 8), tiny.VOCABULARY, batch_size=4)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("text", "", "empty"),
    ("text", "   \n", "no document"),
    ("ids", "[1]\n[2]\n", "at least 2 tokens"),
    ("ids", "[1, 9999]\n", "9999 does not fit"),
    ("ids", '["a"]\n', "line 1 is not a list of token ids"),
    ("ids", "[1, 2\n", "line 1: not JSON"),
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
        load(DataSpec(name="world"), Other())


def test_ids_above_the_vocabulary_are_refused():
    with pytest.raises(LlmoptError, match="vocabulary of 96"):
        data.as_batches(torch.full((1, 4), 96), 96)


ROLES = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|endoftext|> {% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")
TALK = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "runs near the river"},
        {"role": "assistant", "content": "the king sings ."}]


@pytest.fixture
def talker(tmp_path):
    """A model folder whose tokenizer puts BOS before text by itself, and has a template with roles and its own BOS."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = ROLES
    tokenizer.save_pretrained(tmp_path / "m")
    tiny.make("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "m")
    return tmp_path / "m", tokenizer


def by_hand(tokenizer, turns: list[dict]) -> list[int]:
    """BOS once, then for each turn its role, its words, the end."""
    ids = [tokenizer.bos_token_id]
    for turn in turns:
        words = [f"<|{turn['role']}|>", *turn["content"].split(), "<|endoftext|>"]
        ids += [tokenizer.get_vocab()[word] for word in words]
    return ids


def calibrated(monkeypatch, folder, output, text: str) -> str:
    """The fingerprint of the calibration data that `llmopt compress` really used."""
    recipe = output.with_suffix(".yaml")
    recipe.write_text(f"data: {text}\nsteps:\n  - quant.gptq: {{bits: 4, group_size: 16}}\n")
    assert call(monkeypatch, "compress", "--recipe", recipe, "--model", folder, "--output", output, "--no-eval") == 0
    return json.loads((output / "llmopt.json").read_text())["calibration_sha256"]


@pytest.mark.parametrize("kind", ["messages", "plain"])
def test_calibration_through_the_chat_template(monkeypatch, tmp_path, talker, kind):
    folder, tokenizer = talker
    turns = TALK if kind == "messages" else [{"role": "user", "content": "the fox runs near the river . " * 2}]
    ids = by_hand(tokenizer, turns)
    assert ids.count(tokenizer.bos_token_id) == 1
    chats, rows = tmp_path / "chats.jsonl", tmp_path / "ids.jsonl"
    column = turns if kind == "messages" else turns[0]["content"]
    chats.write_text(3 * (json.dumps({"talk": column}) + "\n"))
    rows.write_text(3 * (json.dumps(ids) + "\n"))
    found = calibrated(monkeypatch, folder, tmp_path / "a",
                       f"{{name: text, path: {chats}, column: talk, template: chat}}")
    assert found == calibrated(monkeypatch, folder, tmp_path / "b", f"{{name: ids, path: {rows}}}")


def test_a_template_that_refuses_its_messages_is_one_line(tmp_path, talker):
    folder, tokenizer = talker
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"text": TALK}) + "\n")
    with pytest.raises(LlmoptError, match="the chat template cannot be used: it refuses .* roles must alternate"):
        load(DataSpec(name="text", path=str(file), template="chat"), tokenizer)


def rows_of(batches) -> list[list[int]]:
    return [row[mask.bool()].tolist() for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_held_out_rows_are_those_behind_the_calibration(tmp_path):
    model, words = tiny.make("llama", vocab_size=512), ["fox", "bird", "river", "forest", "king", "the"]
    documents = [" ".join([word] * 45) for word in words]
    (tmp_path / "t.txt").write_text("<|endoftext|>".join(documents))
    (tmp_path / "i.jsonl").write_text("".join(json.dumps([i] * 40) + "\n" for i in range(6)))
    for spec in (DataSpec(name="text", path=str(tmp_path / "t.txt"), samples=4, length=41),
                 DataSpec(name="ids", path=str(tmp_path / "i.jsonl"), samples=4),
                 DataSpec(name="world", samples=4, length=41)):
        seen = rows_of(data.load(spec, model.config, build_tokenizer()))
        unseen = rows_of(data.held_out(spec, build_tokenizer(), model, 2, 40))
        assert len(unseen) == 2 and all(len(row) == 40 for row in unseen)
        assert not {tuple(row[:40]) for row in seen} & set(map(tuple, unseen))
        more = rows_of(data.load(DataSpec(**{**vars(spec), "samples": 6}), model.config, build_tokenizer()))
        assert [row[:40] for row in more[4:]] == unseen


def test_a_source_without_a_rest_hands_over_to_the_model(tmp_path, caplog):
    caplog.set_level("INFO", "llmopt")
    model = tiny.make("llama")
    (tmp_path / "i.jsonl").write_text("".join(json.dumps([i] * 40) + "\n" for i in range(6)))
    spec = DataSpec(name="ids", path=str(tmp_path / "i.jsonl"), samples=6)
    found = rows_of(data.held_out(spec, None, model, 3, 40))
    assert len(found) == 3 and "held-out rows are sampled from the model" in caplog.text
    assert found == rows_of(data.held_out(DataSpec(name="self", samples=6), None, model, 3, 40))
    assert found == Sampler(model).rows(DataSpec(name="self", samples=9), 40)[6:]


CONFIGS = """---
configs:
- config_name: {config}
  data_files: [{{split: {split}, path: rows.jsonl}}]
---
"""


def dataset(folder, alias: hub.Alias, records: list) -> str:
    """A folder laid out as the hub's dataset is."""
    folder.mkdir()
    (folder / "README.md").write_text(CONFIGS.format(config=alias.config or "default", split=alias.split))
    (folder / "rows.jsonl").write_text("".join(json.dumps({alias.column: record}) + "\n" for record in records))
    return str(folder)


@pytest.mark.parametrize("name", hub.ALIASES)
def test_datasets_by_their_short_names(monkeypatch, tmp_path, talker, name):
    alias, tokenizer = hub.ALIASES[name], talker[1]
    words = ["fox", "bird", "river", "forest", "king"]
    if alias.template:
        answer = {"role": "assistant", "content": "the fox " * 20}
        records = [[{"role": "user", "content": word}, answer] for word in words]
    else:
        records = ["", *(f"{word} " * 70 for word in words), ""]
    path = dataset(tmp_path / "d", alias, records)
    monkeypatch.setitem(hub.ALIASES, name, replace(alias, path=path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "c"))
    spec, model = DataSpec(name=name, samples=3, length=30), tiny.make("llama", vocab_size=len(tokenizer))
    found, again, other = (rows_of(data.load(one, model.config, tokenizer))
                           for one in (spec, spec, replace(spec, seed=5)))
    assert found == again != other and len(found) == 3 and all(len(row) == 30 for row in found)
    assert all(tokenizer.decode(row).count("<|user|>") == (alias.template is not None) for row in found)
    unseen = rows_of(data.held_out(spec, tokenizer, model, 2, 30))
    assert len(unseen) == 2 and not set(map(tuple, found)) & set(map(tuple, unseen))
    if alias.joined:            # lines of one text: five times 70 words make rows without padding
        assert len(rows_of(data.load(replace(spec, samples=50), model.config, tokenizer))) == 350 // 29


def test_short_names_say_it_all():
    assert set(hub.ALIASES) == set(BY_NAME)
    for name in ("c4", "self"):
        for key, given in {**dict.fromkeys(("path", "config", "split", "column"), "x"), "template": "chat"}.items():
            with pytest.raises(LlmoptError, match=f"{key}: '{given}' given, nothing, as data.name is '{name}'"):
                DataSpec(name=name, **{key: given})


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(monkeypatch):
    tried = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *given: tried.append(given) or (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr("llmopt.calibration.hub.getproxies", dict)
    with pytest.raises(LlmoptError, match=r"data \(pile\): the dataset cannot be loaded: NeelNanda/pile-10k: .*self"):
        load(DataSpec(name="pile"))
    assert len(tried) == 1
