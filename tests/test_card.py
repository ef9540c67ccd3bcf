"""The card and the recipe of a checkpoint tell that model's truth, and are data that the hub can read."""
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

import llmopt
from llmopt.checkpoint.card import render
from llmopt.checkpoint.origin import origin
from llmopt.checkpoint.save import recipe_text
from llmopt.checkpoint.shareable import NAMING, shareable
from llmopt.recipe.reader import PACKAGED, load, parse
from llmopt.run.pipeline import run
from tests import tiny

RECIPE = """# A recipe of mine: on another model 1.91 MB -> 606 kB, perplexity 4.919 -> 4.937
model: {id: MODEL}
data: {name: ids, path: IDS, samples: 2}
steps:
  - quant.gptq: {group_size: 16}       # 17.3 % smaller
  - kv.snapkv: {ratio: 0.5}
eval: {tasks: []}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder that was compressed, the checkpoint)."""
    home = tmp_path_factory.mktemp("secret-home")
    tiny.make("llama").save_pretrained(home / "mine")
    (home / "mine/README.md").write_text("---\nlicense: 'other'\nlicense_name: for-cats\n"
                                         "base_model: cats/cat-1b\n---\n")
    (home / "ids.jsonl").write_text("\n".join(json.dumps(list(range(3, 40))) for _ in range(2)))
    text = RECIPE.replace("MODEL", str(home / "mine")).replace("IDS", str(home / "ids.jsonl"))
    run(parse(text, "mine.yaml", ("steps.0.bits=3",)), home / "out")
    return home / "mine", home / "out"


def with_facts(folder, tmp_path, **facts) -> str:
    """The card of a checkpoint whose llmopt.json says something else."""
    for name in ("config.json", "llmopt.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    said = json.loads((folder / "llmopt.json").read_text()) | facts
    (tmp_path / "llmopt.json").write_text(json.dumps(said))
    return render(tmp_path)


def test_the_card_names_no_path_but_the_model_of_the_hub_that_the_folder_was_made_from(made):
    source, out = made
    text = (out / "README.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert "secret-home" not in text and "model_name" not in head
    assert (head["base_model"], head["base_model_relation"]) == ("cats/cat-1b", "quantized")
    assert (head["license"], head["license_name"]) == ("other", "for-cats")
    assert "mine, a local folder made from [cats/cat-1b]" in text
    assert "llmopt compress --recipe recipe.yaml --model FOLDER --output out" in text
    assert "\nbase_model: mine, not a name of the hub; FOLDER stands for it\n" in text


def test_the_card_says_what_plain_transformers_leaves_out_and_what_was_done(made):
    text = (made[1] / "README.md").read_text()
    assert "`kv.snapkv` acts while the model runs, and only after `import llmopt`" in text
    assert "needs the package `compressed-tensors`" in text
    assert "Calibrated with 2 rows, 74 tokens of the data `ids`." in text
    steps = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["steps"]
    assert steps[0]["quant.gptq"]["bits"] == 3 and steps[1]["kv.snapkv"]["ratio"] == 0.5


def test_the_python_of_the_card_runs(made, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (made[1] / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(made[1])
    names = {}
    exec(code, names)                               # a tiny model has no tokenizer, and the card then speaks of none
    assert type(names["model"]).__name__ == "LlamaForCausalLM" and "AutoTokenizer" not in code


def test_scores_are_a_model_index_and_what_is_no_number_is_left_out(made, tmp_path):
    rows = [["text_ppl", "word_perplexity", 9.5], ["text_ppl", "bits_per_byte", 1.25], ["copy", "acc", 0.5],
            ["copy", "broken", float("nan")]]
    text = with_facts(made[1], tmp_path, scores={"before": [], "after": rows}, table=[["copy acc", "1", ".5"]])
    found = ModelCard(text).data.eval_results
    assert [[r.dataset_type, r.metric_type, r.metric_value] for r in found] == rows[:3]
    assert "Scores of tasks are on all documents of each." in text and "calibration did not see" not in text
    scores = {"before": [], "after": [["fidelity", "kl", 0.1]]}
    text = with_facts(made[1], tmp_path, scores=scores, table=[["a", "", ""]])
    assert "are on rows of the data `ids`, which the calibration did not see" in text and "of tasks" not in text


def test_a_card_of_a_model_made_in_python_names_no_recipe_and_claims_no_base(tmp_path):
    model = tiny.make("llama")
    report = llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=16)])
    text = (llmopt.save(model, tmp_path / "out", report=report) / "README.md").read_text()
    assert "recipe.yaml" not in text and "`llmopt.save` in Python" in text
    assert "base_model" not in text and "# a llama model, compressed" in text
    assert "Plain transformers loads it" in text


def test_the_written_recipe_is_the_one_that_ran_without_the_comments_of_another(made):
    source, out = made
    text = (out / "recipe.yaml").read_text()
    assert "606" not in text and "17.3" not in text
    ran = json.loads((out / "llmopt.json").read_text())["recipe"]
    assert parse(text, "recipe.yaml").resolved() == ran and ran["steps"][0]["quant.gptq"]["bits"] == 3
    assert ran["model"]["id"] == str(source)


@pytest.mark.parametrize("name", sorted(file.stem for folder in PACKAGED for file in folder.glob("*.yaml")))
def test_every_packaged_recipe_survives_being_written_out(name):
    recipe = load(name)
    assert parse(recipe_text(recipe), name).resolved() == recipe.resolved()


def test_a_model_that_code_was_allowed_for_is_made_again_by_the_command_line(made, tmp_path):
    text = with_facts(made[1], tmp_path, changes=["--trust-remote-code", "--model", "/home/me/m"])
    assert "--model FOLDER --trust-remote-code --output out" in text and "/home/me" not in text


@pytest.mark.parametrize("said, ancestor", [
    ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("./a", None), ("/data/llama", None), ("llama", None),
    ("checkpoints/llama", None), ("a/b/c", None), ("", None), (7, None)])
def test_only_a_name_of_the_hub_is_an_ancestor(said, ancestor, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": said}))
    found = origin(str(tmp_path), "", None)
    assert (found["base_repo"], found["base_ancestor"], found["base_licence"]) == (None, ancestor, None)


def test_a_snapshot_of_the_hubs_cache_goes_by_its_name(tmp_path):
    snapshot = tmp_path / "models--cats--cat-1b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit       # as ever\n---\n# Cat\n\n---\nlicense: no\n")
    found = origin(str(snapshot), "", None)
    assert (found["base_repo"], found["base_ancestor"], found["base_licence"]) == ("cats/cat-1b", None, "mit")


@pytest.mark.parametrize("card", ["", "# no head\n---\nlicense: mit\n---\n", "---\nlicense: [*x\n---\n",
                                  "---\n- a\n---\n", "---\nlicense: mit"])
def test_a_card_that_cannot_be_read_gives_nothing(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert origin(str(tmp_path), "", None)["base_licence"] is None


def test_a_written_recipe_leaves_it_to_the_command_line_to_let_code_run():
    allowed = load("rtn", trust_remote_code=True)
    again = parse(recipe_text(allowed), "recipe.yaml", trust_remote_code=True)
    assert again.resolved() == allowed.resolved() and "trust_remote_code" not in recipe_text(allowed)


def test_what_is_uploaded_names_no_path_of_this_machine(made):
    source, folder = made
    texts = shareable(folder)
    assert set(texts) == {name for name in NAMING if (folder / name).is_file()}
    assert any("secret-home" in (folder / name).read_text() for name in texts)
    assert not [name for name, text in texts.items() if "secret-home" in text]
    assert parse(texts["recipe.yaml"], "recipe.yaml").model.id == "mine"
    assert json.loads(texts["llmopt.json"])["recipe"]["data"]["path"] == "ids.jsonl"
