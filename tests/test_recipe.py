"""Recipes: what is accepted, and that each error names file, line, key and the nearest valid choice."""
import pytest
import torch

import llmopt
from llmopt import recipe
from llmopt.errors import LlmoptError
from llmopt.recipe import assign, reader
from llmopt.recipe.schema import recipe_schema
from llmopt.recipe.yaml_lines import read_yaml
from llmopt.specs import ModelSpec
from tests import tiny

GOOD = """# a comment
model: {id: llmopt/reference, dtype: float32}
steps:
  - heads.span
  - quant.rtn:
      bits: 4
      group_size: 32
"""


def test_a_recipe_becomes_methods_with_every_default_resolved():
    made = recipe.parse(GOOD, "r.yaml")
    assert [s.name for s in made.steps] == ["heads.span", "quant.rtn"]
    assert made.steps[1] == llmopt.quant.RTN(bits=4, group_size=32)
    assert made.resolved()["steps"][1]["quant.rtn"]["group_size"] == 32
    assert made.resolved()["data"]["samples"] == 128


@pytest.mark.parametrize(("change", "path", "value"), [
    ("steps.1.bits=3", lambda r: r.steps[1].bits, 3),
    ("model.dtype=bfloat16", lambda r: r.model.dtype, "bfloat16"),
    ("data.samples=7", lambda r: r.data.samples, 7),
    ("eval.tasks=[world_ppl]", lambda r: r.eval.tasks, ["world_ppl"]),
])
def test_set_overrides_one_value(change, path, value):
    assert path(recipe.parse(GOOD, "r.yaml", (change,))) == value


@pytest.mark.parametrize(("text", "expected"), [
    ("modle: {}\nsteps: [quant.rtn]", ["r.yaml:1", "'modle'", "did you mean 'model'"]),
    ("steps:\n  - quant.rtn: {bit: 3}", ["r.yaml:2", "'bit'", "did you mean 'bits'"]),
    ("steps:\n  - quant.rtm: {}", ["r.yaml:2", "'quant.rtm'", "did you mean 'quant.rtn'"]),
    ("steps:\n  - quant.rtn:\n      bits: 0", ["r.yaml:3", "bits", "0"]),
    ("steps:\n  - quant.rtn:\n      bits: 17", ["r.yaml:3", "bits", "17"]),
    ("steps:\n  - quant.rtn:\n      bits: four", ["r.yaml:3", "bits", "'four'"]),
    ("steps:\n  - kv.snapkv:\n      ratio: 1.0", ["r.yaml:3", "ratio", "1.0"]),
    ("steps:\n  - kv.snapkv:\n      ratio: -0.1", ["r.yaml:3", "ratio", "-0.1"]),
    ("steps:\n  - prune.magnitude:\n      ratio: 1.0", ["r.yaml:3", "ratio", "1.0"]),
    ("steps:\n  - prune.magnitude:\n      ratio: -1", ["r.yaml:3", "ratio", "-1"]),
    ("steps:\n\t- quant.rtn", ["r.yaml:2", "tabs"]),
    ("seed: 1\nseed: 2\nsteps: [quant.rtn]", ["r.yaml:2", "'seed'", "twice"]),
    ("steps:\n  - quant.rtn\n  - heads.span", ["r.yaml:1", "heads.span must come before quant.rtn"]),
    ("steps:\n  - quant.rtn\n  - quant.gptq", ["r.yaml:1", "at most one"]),
    ("steps: []", ["r.yaml:1", "at least one"]),
    ("", ["r.yaml:1", "steps"]),
    ("- a", ["r.yaml:1", "mapping"]),
    ("steps: &x [*x]", ["r.yaml", "aliases"]),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nsteps: [quant.rtn]", ["r.yaml:2", "aliases"]),
    ("seed: !!python/object/apply:os.system [x]\nsteps: [quant.rtn]", ["r.yaml:1", "tags"]),
    ("seed: !!bool x\nsteps: [quant.rtn]", ["r.yaml:1", "tags"]),
    ("seed: 0x" + "f" * 6000, ["r.yaml:1", "too large a number"]),
    ("seed: " + "9" * 6000, ["r.yaml:1", "cannot be read"]),
    ("steps: " + "[" * 400_000, ["r.yaml:1", "too deep"]),
    ("steps:\n" + "- quant.rtn\n" * 30_000, ["r.yaml:19998", "too long"]),
    ("#" * 1_000_001, ["r.yaml", "1,000,001 characters"]),
    ("data: {samples: 1000000000}\nsteps: [quant.rtn]", ["r.yaml:1", "samples: 1000000000", "1 to 1000000"]),
    ("steps: [{\"quant.rtn\\e[31m\\n\": {}}]", ["r.yaml:1", "no method"]),
    ("steps:\n  - kv.snapkv:\n      ratio: 0.5\n      allocate:\n        prefix:\n          floor: -1",
     ["r.yaml:6: kv.snapkv: allocate.prefix.floor: -1 given, a whole number at least 0, or null expected"]),
    ("steps:\n  - kv.snapkv:\n      ratio: 0.5\n      allocate:\n        prefix: {flor: 1}",
     ["r.yaml:5", "'allocate.prefix.flor'", "did you mean 'floor'"]),
    ("steps:\n  - kv.snapkv:\n      allocate: prefx", ["r.yaml:3", "allocate: 'prefx'", "did you mean 'prefix'"]),
    ("steps:\n  - quant.rtn:\n      bits: 4\n      overrides:\n        a.b: {}\n        c.d:\n          bits: 9",
     ["r.yaml:7", "overrides.c.d.bits: 9 given"]),
    ("steps:\n  - quant.rtn:\n      widths:\n      - 2\n      - 99", ["r.yaml:5", "widths[1]: 99"]),
    ("data:\n  name: words\nsteps: [quant.rtn]", ["r.yaml:2", "'words'", "world"]),
    ("data: {name: text}\nsteps: [quant.rtn]", ["r.yaml:1", "path"]),
    ("format: gguf\nsteps: [quant.rtn]", ["r.yaml:1", "'gguf'"]),
    ("steps: " + "[" * 200 + "]" * 200, ["r.yaml:1"]),
])
def test_bad_input_is_one_line_that_says_where(text, expected):
    with pytest.raises(LlmoptError) as caught:
        recipe.parse(text, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_set_replaces_a_whole_step_and_fills_a_section_written_as_null():
    made = recipe.parse("data:\nsteps: [heads.span, quant.rtn: ]", "r.yaml",
                        ("steps.0={heads.gradient: {}}", "steps.1.bits=3", "data.samples=9"))
    assert [step.name for step in made.steps] == ["heads.gradient", "quant.rtn"]
    assert (made.steps[1].bits, made.data.samples) == (3, 9)


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path):
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(LlmoptError, match="too many for a recipe"):
        recipe.load(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("assignment", ["steps.\u00b2.bits=3", "steps.-1.bits=3", "steps.1.bits.x=3", "steps.1.bits=*x",
                                        "steps.1.bits=!!python/name:os.system", "seed.x=1", "steps.1=3", "x.y.z=3",
                                        "steps.9.bits=3", "steps.1.bits", "steps.x.bits=3", "steps.1.bit=3"])
def test_a_bad_override_names_itself(assignment):
    with pytest.raises(LlmoptError, match="steps|bit|seed|'x'"):
        recipe.parse(GOOD, "r.yaml", (assignment,))


def test_an_unknown_recipe_lists_the_packaged_ones():
    with pytest.raises(LlmoptError, match="did you mean 'quickstart'"):
        recipe.load("quickstrat")


def test_every_packaged_recipe_can_be_read():
    files = sorted(reader.PACKAGED[0].glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        assert recipe.load(str(file)).steps, file
        assert len(file.read_text().splitlines()) <= 30, file


TWO = """steps:
  - heads.span
  - quant.gptq: {group_size: 32}
  - kv.snapkv: {ratio: 0.5}
"""


@pytest.mark.parametrize(("key", "full"), [
    ("steps.gptq.bits", "steps.1.bits"), ("steps.quant.gptq.bits", "steps.1.bits"), ("gptq.bits", "steps.1.bits"),
    ("quant.gptq.bits", "steps.1.bits"), ("bits", "steps.1.bits"), ("ratio", "steps.2.ratio"),
    ("steps.1.bits", "steps.1.bits"), ("steps.gptq", "steps.1"), ("samples", "data.samples"), ("tasks", "eval.tasks"),
    ("data.samples", "data.samples"), ("seed", "seed"), ("tokens.actnorm.share", "steps.1.tokens.actnorm.share"),
    ("id", "model.id")])
def test_a_key_may_be_shortened_where_it_is_unambiguous(key, full):
    data, _ = read_yaml(TWO, "r.yaml")
    assert ".".join(assign.whole_key(data, key)) == full


def test_numbers_with_an_exponent_are_numbers_without_a_point_too():
    data, _ = read_yaml("{a: 1e-4, b: 2E3, c: -1.5e-6, d: '1e-4', e: 1e-x, f: 2:4}", "r.yaml")
    assert data == {"a": 1e-4, "b": 2000.0, "c": -1.5e-6, "d": "1e-4", "e": "1e-x", "f": "2:4"}


def test_short_keys_change_what_they_name_and_are_kept_written_out():
    made = recipe.parse(TWO, "r.yaml", ("bits=3", "steps.snapkv.ratio=0.25", "samples=9"))
    assert (made.steps[1].bits, made.steps[2].ratio, made.data.samples) == (3, 0.25, 9)
    assert made.changes == ("--set", "steps.1.bits=3", "--set", "steps.2.ratio=0.25", "--set", "data.samples=9")


@pytest.mark.parametrize(("text", "assignment", "expected"), [
    (TWO, "bit=3", "--set bit=3: unknown key 'bit'. Keys: steps.gptq.bits, "),
    (TWO, "steps.gtpq.bits=3", "no step gtpq (did you mean 'gptq'?); there are: 0 heads.span, 1 quant.gptq"),
    (TWO, "batch_size=3", "'batch_size' is ambiguous: data.batch_size or eval.batch_size"),
    ("steps: [kv.snapkv: {ratio: .5}, attention.a_shape: ]", "window=3",
     "'window' is ambiguous: steps.snapkv.window or steps.a_shape.window"),
    ("steps: [prune.magnitude: {}, prune.magnitude: {}]", "steps.magnitude.ratio=.5",
     "'magnitude' is ambiguous: steps.0 is prune.magnitude, steps.1 is prune.magnitude"),
    ("steps: [prune.magnitude: {}, prune.magnitude: {}]", "ratoi=.5", "unknown key 'ratoi'. Keys: steps.0.ratio"),
    ("steps: 3", "steps.gptq.bits=3", "no step gptq"), ("steps: [[], 3, {}]", "bits=3", "unknown key 'bits'")])
def test_a_key_that_is_none_or_several_lists_the_full_ones(text, assignment, expected):
    with pytest.raises(LlmoptError) as caught:
        recipe.parse(text, "r.yaml", (assignment,))
    assert expected in str(caught.value)


@pytest.mark.parametrize(("given", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"),
                                             ("fp32", "float32"), ("torch.bfloat16", "bfloat16"),
                                             (torch.float16, "float16"), (None, None)])
def test_a_type_may_be_spelled_as_people_do(given, name):
    assert ModelSpec(dtype=given).dtype == name == llmopt.quant.RTN(scale_dtype=given).scale_dtype
    assert ModelSpec(compute_dtype=given or "auto").compute_dtype == name or given is None
    with pytest.raises(LlmoptError, match="one of float32, bfloat16, float16"):
        ModelSpec(dtype=torch.int8)
    if isinstance(given, str):
        assert given in recipe_schema()["$defs"]["ModelSpec"]["properties"]["compute_dtype"]["enum"]


def test_a_score_step_that_is_missing_is_named_before_the_work():
    before, says = "steps:\n- heads.span\n- quant.rtn\n- ", "heads.replay before it"
    for step, name in (("attention.local_heads: {heads: heads.spam}", r"heads.spam before it \(did you mean 'heads.s"),
                       ("attention.a_shape: {heads: heads.hess}", "heads.hess before it"),
                       ("kv.snapkv: {ratio: 0.5, allocate: heads, heads: heads.replay}", says),
                       ("kv.snapkv: {ratio: 0.5, allocate: captured}", says),
                       ("kv.snapkv: {ratio: 0.5, allocate: profile}", says), ("kv.kvzap: {ratio: 0.5}", says)):
        with pytest.raises(LlmoptError, match=f"^r.yaml:4: {step.split(':')[0]} needs the step {name}"):
            recipe.parse(before + step, "r.yaml")
    for step in ("attention.local_heads", "kv.snapkv: {ratio: 0.5, allocate: profile, heads: a.json}",
                 "kv.snapkv: {ratio: 0.5, allocate: heads, heads: heads.span.sink_mass}"):
        assert recipe.parse(before + step, "r.yaml").steps
    with pytest.raises(LlmoptError, match="^prune.heads needs the step heads.gradient before it$"):
        llmopt.compress(tiny.make("llama"), ["prune.heads"])
