"""The JSON Schema of recipes: what the reader takes it takes, and misspelt keys, names and wrong values it does not."""
import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from llmopt.recipe import reader
from llmopt.recipe.schema import recipe_schema
from tests import test_bad_input as bad
from tests.command import call

SETS, RECIPES = (case.args[1] for case in (bad.test_overrides.pytestmark[0], bad.test_recipes.pytestmark[0]))
SETS, RECIPES = [given for given, _ in SETS], [text for text, _ in RECIPES]
UNSEEN = {                      # what a schema cannot see
    "words of --set that no file can hold": [
        "", "steps.0.bits", "steps.0.bits=[", "=3", "steps.9.bits=3", "steps.0.bits.x=3"],
    "not a number of JSON, to which every bound holds": ["steps.0.bits=.nan"],
    "depends on the model": ["steps.0.group_size=7", "steps.0.ignore=[nothing]", "steps.0.ignore=['*']"],
    "depends on the tasks that are installed": ["eval.tasks=[world_pbl]"],
    "depends on the machine": ["model.device=cuda:99", "model.device=cudaa", "model.device=gpu", "model.device=meta"],
}

@pytest.fixture(scope="module")
def schema():
    return json.loads(json.dumps(recipe_schema()))


@pytest.fixture(scope="module")
def fits(schema):
    """True for what an editor takes; the schema itself is one by the rules of its draft."""
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).is_valid


def test_every_packaged_recipe_is_valid(fits):
    for file in sorted(reader.PACKAGED[0].glob("*.yaml")):
        assert fits(yaml.safe_load(file.read_text())), file


@pytest.mark.parametrize("text", [
    "steps: [quant.rtn]", "data:\nsteps: [quant.rtn: ]",
    "steps: [kv.snapkv: {ratio: .5, allocate: {prefix: {floor: 2}}}]",
    "steps: [quant.gptq: {overrides: {q_proj: {bits: 16}}, widths: [3, 16], group_size: -1, bits: 3.5, allocate: zd}]",
    "steps: [quant.weights: {solver: {gptq: {tokens: alike}}}]", "eval: {tasks: [a]}\nsteps: [heads.span]"])
def test_what_the_reader_takes_is_valid(text, fits):
    reader.parse(text, "r.yaml")
    assert fits(yaml.safe_load(text))


@pytest.mark.parametrize("text", [
    "step: [quant.rtn]", "steps: []", "steps: [quant.rtm]", "steps: [quant.rtn: {bit: 3}]",
    "data: {sample: 3}\nsteps: [quant.rtn]", "steps: [{quant.rtn: {}, kv.snapkv: {}}]",
    "steps: [quant.rtn: {}]\nseed: -1", "format: gguf\nsteps: [quant.rtn]",
    "steps: [kv.snapkv: {ratio: 1.0}]", "steps: [kv.snapkv: {ratio: .5, allocate: prefx}]",
    "steps: [kv.snapkv: {ratio: .5, allocate: {prefix: {flor: 2}}}]", "steps: [quant.rtn: {overrides: {q: {bits: 9}}}]",
    "steps: [quant.rtn: {widths: [99]}]", "steps: [quant.weights: {solver: {gptq: {damping: 3}}}]"])
def test_what_the_reader_refuses_is_not_valid(text, fits):
    with pytest.raises(reader.LlmoptError):
        reader.parse(text, "r.yaml")
    assert not fits(yaml.safe_load(text))


def as_file(assignment: str) -> dict:
    """The recipe of test_bad_input with one key set, as somebody would write it."""
    made, (key, value) = yaml.safe_load(bad.RTN), assignment.split("=", 1)
    *above, last = [int(word) if word.isdigit() else word for word in key.split(".")]
    place = made
    for word in above:
        place = place.setdefault(word, {}) if isinstance(place, dict) else place[word]
        place = place["quant.rtn"] if isinstance(word, int) else place
    place[last] = yaml.safe_load(value)
    return made


@pytest.mark.parametrize("assignment", [given for given in SETS if given not in sum(UNSEEN.values(), [])])
def test_bad_input_is_seen_by_the_schema(assignment, fits):
    assert not fits(as_file(assignment))


@pytest.mark.parametrize("assignment", sum(list(UNSEEN.values())[1:], []))
def test_what_is_said_to_be_unseen_is(assignment, fits):
    assert fits(as_file(assignment))


@pytest.mark.parametrize("text", RECIPES)
def test_bad_recipes_are_no_yaml_or_seen_by_the_schema(text, fits):
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return
    assert not fits(content) or b"steps: [quant.rtn]\nsteps" in text            # YAML itself keeps the last of two keys


def test_every_field_is_explained_and_every_reference_leads_somewhere(schema):
    snapkv = schema["$defs"]["method.kv.snapkv"]["properties"]
    assert snapkv["window"] == {"type": "integer", "minimum": 1, "default": 32, "title": "Window",
                                "description": "queries that vote, counted from the end of the prompt; always kept"}
    assert snapkv["allocate"]["default"] == "uniform" and snapkv["allocate"]["$ref"] == "#/$defs/allocator"
    text = json.dumps(schema)
    for name in schema["$defs"]:
        assert f'"#/$defs/{name}"' in text, name
    assert "x-llmopt" not in text


def test_the_command_prints_it(schema, monkeypatch, capsys):
    assert call(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema))
