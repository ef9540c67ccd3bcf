"""The JSON Schema of recipes: what the reader takes it takes, and misspelt keys, names and wrong values it does not."""
import json

import pytest
import yaml

from llmopt.recipe import reader
from llmopt.recipe.schema import recipe_schema
from tests.command import call

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
         "null": type(None)}


def fits(value, node: dict, root: dict) -> bool:
    """Whether a value is as a schema says; the keywords that the schema of recipes uses."""
    if "$ref" in node and not fits(value, root["$defs"][node["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "anyOf" in node and not any(fits(value, one, root) for one in node["anyOf"]):
        return False
    if "enum" in node and value not in node["enum"] or "const" in node and value != node["const"]:
        return False
    if "type" in node:
        kind = TYPES[node["type"]]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            return False
    if isinstance(value, dict):
        return within(value, node, root)
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(fits(v, node.get("items", {}), root) for v in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (node.get("minimum", value) <= value <= node.get("maximum", value)
                and not value <= node.get("exclusiveMinimum", value - 1)
                and not value >= node.get("exclusiveMaximum", value + 1))
    return True


def within(value: dict, node: dict, root: dict) -> bool:
    known, other = node.get("properties", {}), node.get("additionalProperties", True)
    if not node.get("minProperties", 0) <= len(value) <= node.get("maxProperties", len(value)):
        return False
    if not set(node.get("required", [])) <= set(value):
        return False
    return all(fits(v, known[k], root) if k in known else other is True or other and fits(v, other, root)
               for k, v in value.items())


@pytest.fixture(scope="module")
def schema():
    return recipe_schema()


def test_every_packaged_recipe_is_valid(schema):
    for file in sorted(reader.PACKAGED[0].glob("*.yaml")):
        assert fits(yaml.safe_load(file.read_text()), schema, schema), file


@pytest.mark.parametrize("text", [
    "steps: [quant.rtn]", "data:\nsteps: [quant.rtn: ]",
    "steps: [kv.snapkv: {ratio: .5, allocate: {prefix: {floor: 2}}}]",
    "steps: [quant.gptq: {overrides: {q_proj: {bits: 16}}, widths: [3, 16], group_size: -1, bits: 3.5, allocate: zd}]",
    "steps: [quant.weights: {solver: {gptq: {tokens: alike}}}]", "eval: {tasks: [a]}\nsteps: [heads.span]"])
def test_what_the_reader_takes_is_valid(text, schema):
    reader.parse(text, "r.yaml")
    assert fits(yaml.safe_load(text), schema, schema)


@pytest.mark.parametrize("text", [
    "step: [quant.rtn]", "steps: []", "steps: [quant.rtm]", "steps: [quant.rtn: {bit: 3}]",
    "data: {sample: 3}\nsteps: [quant.rtn]", "steps: [{quant.rtn: {}, kv.snapkv: {}}]",
    "steps: [quant.rtn: {}]\nseed: -1", "format: gguf\nsteps: [quant.rtn]",
    "steps: [kv.snapkv: {ratio: 1.0}]", "steps: [kv.snapkv: {ratio: .5, allocate: prefx}]",
    "steps: [kv.snapkv: {ratio: .5, allocate: {prefix: {flor: 2}}}]", "steps: [quant.rtn: {overrides: {q: {bits: 9}}}]",
    "steps: [quant.rtn: {widths: [99]}]", "steps: [quant.weights: {solver: {gptq: {damping: 3}}}]"])
def test_what_the_reader_refuses_is_not_valid(text, schema):
    with pytest.raises(reader.LlmoptError):
        reader.parse(text, "r.yaml")
    assert not fits(yaml.safe_load(text), schema, schema)


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
