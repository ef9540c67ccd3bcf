"""Calibration rows sampled from the model itself: their distribution, repeatability, conversations, and the cache."""
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from llmopt_evals.world.tokenizer import build_tokenizer

from llmopt.calibration import data, sampling
from llmopt.calibration.conversation import conversation_of
from llmopt.calibration.sampling import Sampler, drawn_from, noise_of, start_of
from llmopt.errors import LlmoptError
from llmopt.files import cache
from llmopt.forecast.sampling import Foretaste
from llmopt.scale.processes import Ranks
from llmopt.specs import DataSpec, ModelSpec
from tests import tiny
from tests.command import call
from tests.test_data import ROLES

SPEC = DataSpec(name="self", samples=6, length=12, batch_size=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def talker():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = ROLES
    return tokenizer


def refuse(*_):
    raise AssertionError("sampled again")


def test_a_draw_inverts_the_distribution_function():
    logits = torch.tensor([[.1, .2, .3, .4]]).log().expand(6, 4)
    assert drawn_from(logits, torch.tensor([0, .05, .15, .35, .65, .9999])) == [0, 0, 1, 2, 3, 3]
    never = torch.tensor([[float("-inf"), 0., float("-inf")]]).expand(2, 3)
    assert drawn_from(never, torch.tensor([0., .999])) == [1, 1]
    with pytest.raises(LlmoptError, match="NaN"):
        drawn_from(torch.full((1, 3), float("nan")), torch.zeros(1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_every_token_is_what_the_whole_row_says(family):
    """A row through the KV cache against one forward over the row: the same uniform number draws the same token."""
    model = tiny.make(family)
    rows = Sampler(model).rows(DataSpec(name="self", samples=3, length=30), 30)
    noise = noise_of(0, range(3), 30)
    with torch.no_grad():
        logits = model(torch.tensor(rows)).logits
    again = [drawn_from(logits[:, place - 1], noise[:, place]) for place in range(1, 30)]
    drawn = torch.tensor(rows)[:, 1:].T
    assert (drawn == torch.tensor(again)).float().mean() > 0.95     # at an edge rounding decides
    assert {row[0] for row in rows} == {model.config.bos_token_id} and len(set(map(tuple, rows))) == 3


def test_a_row_depends_on_seed_and_number_alone(monkeypatch):
    model, eight = tiny.make("llama"), DataSpec(name="self", samples=8, length=12)
    together = Sampler(model).rows(eight, 12)
    monkeypatch.setattr(sampling, "ROWS", 3)
    alone = Sampler(model)
    assert alone.sample(range(8), 12, 0) == together
    assert alone.rows(DataSpec(name="self", samples=2, length=12), 12, first=6) == together[6:]
    assert alone.sample(range(8), 12, 1) != together and len(set(map(tuple, together))) == 8


def test_rows_are_kept_and_told_in_one_line(monkeypatch, caplog, own_cache):
    caplog.set_level(logging.INFO, "llmopt")
    model = tiny.make("llama")
    first = data.load(SPEC, model.config, None, Sampler(model))
    assert [list(batch["input_ids"].shape) for batch in first] == [[4, 12], [2, 12]]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", refuse)
        again = data.load(SPEC, model.config, None, Sampler(tiny.make("llama")))
        for other in (DataSpec(name="self", samples=6, length=12, seed=1), DataSpec(name="self", samples=5, length=12),
                      DataSpec(name="self", samples=6, length=11)):
            with pytest.raises(AssertionError, match="again"):
                data.load(other, model.config, None, Sampler(model))
        with pytest.raises(AssertionError, match="again"):
            data.load(SPEC, model.config, None, Sampler(tiny.make("llama", seed=1)))
    assert data.fingerprint(first) == data.fingerprint(again)
    assert len([line for line in caplog.messages if "sampled from this model on 20" in line]) == 1


@pytest.mark.parametrize("damage", [
    lambda text: text[:len(text) // 2], lambda text: "", lambda text: "[1]",
    lambda text: text.replace('"part": [[1, ', '"part": [[2, ')])
def test_damaged_rows_are_sampled_anew(own_cache, damage):
    model = tiny.make("llama")
    rows = Sampler(model).rows(SPEC, 12)
    file, = own_cache.iterdir()
    text = file.read_text()
    assert damage(text) != text
    file.write_text(damage(text))
    assert Sampler(model).rows(SPEC, 12) == rows
    assert json.loads(file.read_text())["part"] == rows


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "file"))
    assert len(Sampler(tiny.make("llama")).rows(SPEC, 12)) == 6
    assert cache.read("rows", {}) is None


def test_both_sides_of_a_conversation_are_the_models(talker):
    vocabulary = talker.get_vocab()
    end, user, assistant = (vocabulary[word] for word in ("<|endoftext|>", "<|user|>", "<|assistant|>"))
    talk = conversation_of(talker)
    assert talk.opening == (talker.bos_token_id, user)
    assert talk.to_assistant == (end, assistant) and talk.to_user == (end, user) and talk.ends == {end}
    model = tiny.make("llama", vocab_size=len(talker))
    with torch.no_grad():           # a model that ends a turn with about every third token
        model.lm_head.weight[end] *= 6
    rows = Sampler(model, talker).rows(DataSpec(name="self", samples=8, length=60), 60)
    turns = 0
    for row in rows[1::2]:
        assert row[:2] == list(talk.opening)
        speakers = [user]
        for place in [place for place, token in enumerate(row[:-1]) if token == end]:
            assert row[place + 1] == (assistant if speakers[-1] == user else user)
            speakers.append(row[place + 1])
        turns += len(speakers)
    assert turns > 8
    assert all(len(row) == 60 for row in rows)
    assert any(end in row for row in rows[::2])         # a plain row goes on behind the end of its text


def test_a_template_that_cannot_be_used_leaves_plain_rows(talker, caplog):
    talker.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = Sampler(tiny.make("llama", vocab_size=len(talker)), talker).rows(SPEC, 12)
    assert {row[0] for row in rows} == {talker.bos_token_id}
    assert sum("without conversations" in line for line in caplog.messages) == 1


def test_where_a_text_begins():
    class Words(dict):
        bos_token_id, eos_token_id, get_vocab = None, None, dict.copy

        def __call__(self, text):
            return {"input_ids": self.front + [7]}

        front = []

    config = SimpleNamespace(vocab_size=50, bos_token_id=None, eos_token_id=[9, 8])
    assert start_of(config, None) == 9
    assert start_of(SimpleNamespace(vocab_size=50, bos_token_id=3, eos_token_id=9), None) == 3
    assert start_of(SimpleNamespace(vocab_size=50), None) is None
    named = Words({"<|endoftext|>": 5})
    named.bos_token_id = 1
    assert start_of(config, named) == 5                 # this tokenizer puts no BOS in front of text
    named.front = [1]
    assert start_of(config, named) == 1
    model = tiny.make("llama")
    model.config.bos_token_id = model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    assert len({row[0] for row in Sampler(model).rows(SPEC, 12)}) > 1


def test_the_fill_of_a_vocabulary_is_never_drawn(talker):
    model = tiny.make("llama", vocab_size=len(talker) + 200)
    rows = Sampler(model, talker).rows(SPEC, 12)
    assert max(map(max, rows)) < len(talker)


class Second(Ranks):
    """A second process, to which rank 0 tells its rows."""

    def agree(self, value):
        assert value is None
        return [[1, 2, 3]]


def test_rank_0_samples_and_the_others_are_told(monkeypatch):
    monkeypatch.setattr(Sampler, "sample", refuse)
    assert Sampler(tiny.make("llama"), ranks=Second(rank=1, size=2)).rows(SPEC, 12) == [[1, 2, 3]]


def test_a_dry_run_samples_a_few_tokens(monkeypatch):
    model, steps = tiny.make("llama"), []
    monkeypatch.setattr(Foretaste, "step", lambda *given: steps.append(1) or Sampler.step(*given))
    sampler = Foretaste(model)
    batch, = data.load(DataSpec(name="self", samples=5, length=100), model.config, None, sampler)
    assert batch["input_ids"].shape == (5, 100) and len(steps) < 10 and sampler.spent.high > 0
    real = Sampler(model).rows(DataSpec(name="self", samples=5, length=100), 100)
    assert batch["input_ids"][:, :6].tolist() == [row[:6] for row in real]
    kept = Foretaste(model)
    assert kept.rows(DataSpec(name="self", samples=5, length=100), 100) == real and not kept.spent.high


@pytest.mark.parametrize("kind", ["falcon_mamba", "nemotron_h"])
def test_a_dry_run_samples_from_states(kind):
    sampler = Foretaste(tiny.make(kind))
    assert len(sampler.rows(DataSpec(name="self", samples=2, length=20), 20)) == 2 and sampler.spent.high > 0


def test_a_model_that_does_not_write_token_by_token_is_one_line():
    with pytest.raises(LlmoptError, match=r"^no rows can be sampled .* path: FILE}\): MiniMax uses cache of its own"):
        Sampler(tiny.make("minimax")).rows(SPEC, 12)


def test_the_default_follows_the_model():
    from llmopt.recipe.reader import Recipe

    assert Recipe().data.name == "world"
    assert Recipe(model=ModelSpec(id="m")).data == DataSpec(name="self")
    assert Recipe(model=ModelSpec(id="m"), data=DataSpec(name="ids", path="p")).data.name == "ids"
    with pytest.raises(LlmoptError, match="data.path is given"):
        DataSpec(path="p")


GPTQ = "data: {samples: 4, length: 40}\nsteps:\n  - quant.gptq: {bits: 4, group_size: 16}\n"


def test_a_run_without_any_data(monkeypatch, tmp_path):
    """In memory and streamed the same bytes; what was used is written down; --resume knows the finished output."""
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(GPTQ)
    words = ["compress", "--recipe", tmp_path / "r.yaml", "--model", tmp_path / "m", "--no-eval"]
    assert call(monkeypatch, *words, "--output", tmp_path / "a") == 0
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "other"))
    assert call(monkeypatch, *words, "--output", tmp_path / "b", "--stream") == 0
    facts = [json.loads((tmp_path / name / "llmopt.json").read_text()) for name in "ab"]
    assert facts[0]["recipe"]["data"]["name"] == "self"
    assert facts[0]["calibration_sha256"] == facts[1]["calibration_sha256"]
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["data"]["name"] == "self"
    monkeypatch.setattr(Sampler, "rows", refuse)
    assert call(monkeypatch, *words, "--output", tmp_path / "a", "--resume") == 0


def test_a_model_larger_than_memory_names_another_source(monkeypatch, tmp_path, capsys):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(GPTQ)
    monkeypatch.setattr("llmopt.run.calibrating.available", lambda: 1000)
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "r.yaml", "--model", tmp_path / "m", "--no-eval",
                "--output", tmp_path / "a", "--stream") == 2
    assert "whole model in memory" in (said := capsys.readouterr().err) and "{name: text, path: FILE}" in said


def test_the_dry_run_tells_the_time_of_sampling(monkeypatch, tmp_path, capsys):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(GPTQ)
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "r.yaml", "--model", tmp_path / "m", "--dry-run",
                "--json") == 0
    parts = {part[0]: part[1:] for part in json.loads(capsys.readouterr().out)["seconds"]}
    assert parts["sampling calibration rows"][1] > 0


@pytest.mark.parametrize("words", [["--dry-run"], ["--output", "out"]])
@pytest.mark.parametrize(("source", "said"), [("name: text, path: none.txt", "there is no such file"),
                                              ("name: hub, path: none.d/e/f", "cannot be loaded")])
def test_data_that_cannot_be_had_is_said_before_the_model_is_loaded(monkeypatch, tmp_path, capsys, words, source, said):
    monkeypatch.chdir(tmp_path)
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(f"data: {{{source}}}\nsteps:\n  - quant.gptq: {{bits: 4, group_size: 16}}\n")
    monkeypatch.setattr("llmopt.model.loading.load_model", refuse)
    assert call(monkeypatch, "compress", "--recipe", "r.yaml", "--model", "m", "--no-eval", *words) == 2
    assert said in capsys.readouterr().err
