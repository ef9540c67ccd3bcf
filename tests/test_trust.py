"""Code that came with a recipe, a model or a task runs only with --trust-remote-code on the command line."""
import json
from pathlib import Path

import pytest
from llmopt_evals.evaluate import task_manager
from llmopt_evals.world.tokenizer import save_tokenizer

from llmopt import recipe
from llmopt.errors import LlmoptError
from llmopt.specs import ModelSpec
from tests import tiny
from tests.command import call

STEPS = "steps:\n  - quant.rtn: {bits: 8, group_size: 16}\n"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef load(**_):\n    return {}\n"
TASK = """task: evil
custom_dataset: !function code.load
output_type: loglikelihood_rolling
test_split: test
doc_to_target: x
"""


@pytest.fixture
def model(tmp_path) -> Path:
    """A model whose configs name code."""
    folder = tmp_path / "m"
    tiny.make("llama", vocab_size=512).save_pretrained(folder)
    save_tokenizer(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": "code.Evil"}}))
    (folder / "code.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("given", ["trust_remote_code: true", "trust_remote_code: 1", "trust_remote_code: 'no'"])
def test_a_recipe_cannot_trust_for_its_user(tmp_path, monkeypatch, capsys, given):
    (tmp_path / "r.yaml").write_text(f"model:\n  id: {tmp_path / 'm'}\n  {given}\n{STEPS}")
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "r.yaml", "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'r.yaml'}:3: model.trust_remote_code")
    assert "give --trust-remote-code on the command line" in error


def test_an_override_is_no_consent_and_the_flag_is():
    with pytest.raises(LlmoptError, match="--trust-remote-code on the command line"):
        recipe.parse(STEPS, "r.yaml", ("model.trust_remote_code=true",))
    assert recipe.parse("model: {trust_remote_code: false}\n" + STEPS, "r.yaml").model.trust_remote_code is False
    made = recipe.parse(STEPS, "r.yaml", (), "somewhere", trust_remote_code=True)
    assert made.model == ModelSpec(id="somewhere", trust_remote_code=True)
    assert made.changes == ("--trust-remote-code", "--model", "somewhere")


@pytest.mark.parametrize("name", ["evil.yaml", "world_ppl.yml", pytest.param(
    "w[o]rld_ppl", marks=pytest.mark.full)])                   # reads lm-eval's index
def test_a_task_of_a_file_runs_only_with_consent(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(TASK)
    (tmp_path / "code.py").write_text(CODE)
    assert call(monkeypatch, "eval", "llmopt/reference", "--tasks", name) == 2
    error = capsys.readouterr().err
    assert ("give --trust-remote-code" in error) == (name != "w[o]rld_ppl"), error
    assert not (tmp_path / "ran").exists()
    if name != "w[o]rld_ppl":
        with pytest.raises(KeyError):           # what the code gives is no data
            task_manager([name], trust=True).load([name])
        assert (tmp_path / "ran").exists()


def test_what_names_code_is_left_behind(model, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(STEPS)
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "r.yaml", "--model", model, "--output",
                tmp_path / "out", "--no-eval") == 0
    for file in (tmp_path / "out").glob("*.json"):
        assert "code.Evil" not in file.read_text(), file
    assert not list(tmp_path.rglob("ran"))
