"""The contract, over every registered method and architecture: it changes something, comes back, repeats itself.

By default every method runs on Llama and on one other architecture, and every architecture under several methods;
--full runs all pairs. What an architecture refuses is read from the table in llmopt/model/README.md, which
test_architectures.py holds true.
"""
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

import llmopt
from llmopt.checkpoint.save import load
from llmopt.method import Run
from llmopt.parts import build
from llmopt.runtime.attach import detach
from tests import table, tiny

REFUSED = {cell: reason for cell, reason in table.read().items() if reason}
# Fields that suit the tiny models; others stand in the method's own test, tests/FAMILY/test_NAME.py, as CONTRACT. A
# method with neither runs with its defaults.
FIELDS = {
    "quant.rtn": {"bits": 3, "group_size": 32},
    "quant.gptq": {"bits": 3, "group_size": 32},
    "quant.weights": {"bits": 3, "group_size": 32, "solver": {"gptq": {"damping": 0.05}}},
    "prune.magnitude": {"ratio": 0.5},
    "kv.streaming": {"ratio": 0.5},
    "kv.snapkv": {"ratio": 0.5, "window": 8},
    **{f"kv.{name}": {"ratio": 0.5, "window": 8} for name in ("critical", "dropkv", "ems", "h2o")},
    **{f"kv.{name}": {"ratio": 0.5}
       for name in ("compactor", "keydiff", "knorm", "leverage", "noncausal", "random", "tova")},
}
NAMES = llmopt.names()


def own_fields(name: str, which: str = "CONTRACT") -> dict:
    """CONTRACT of the method's own test, or BEFORE, {name: fields} of the steps it needs; nothing where there is none.
    """
    family, _, short = name.partition(".")
    if not (Path(__file__).parent / family / f"test_{short}.py").exists():
        return {}
    return getattr(importlib.import_module(f"tests.{family}.test_{short}"), which, {})


FIELDS |= {name: own_fields(name) for name in NAMES if name not in FIELDS}
OTHERS = [family for family in tiny.CONFIGS if family != "llama"]


def pairs(names: list[str]) -> list:
    """(method, architecture), those beyond the default marked for the full tier; no transform that is refused."""
    found = []
    for number, name in enumerate(names):
        families = [family for family in tiny.CONFIGS if (family, name) not in REFUSED]
        others = [family for family in OTHERS if family in families]
        default = {"llama", others[number % len(others)]}
        found += [pytest.param(name, family, marks=() if family in default else pytest.mark.full)
                  for family in families]
    return found


def test_every_architecture_is_among_the_pairs_of_the_default_tier():
    assert {param.values[1] for param in pairs(NAMES) if not param.marks} == {*tiny.CONFIGS}


def method(name: str, family: str):
    """The method with fields that suit the tiny models; pruning without the units that the architecture refuses."""
    made = build(name, FIELDS.get(name, {}))
    if made.stage == "prune":
        made = dataclasses.replace(made, units=tuple(u for u in made.units if (family, u) not in REFUSED))
    return made


def applied(name: str, family: str):
    """(model, record, scores) after the method alone."""
    batch = {"input_ids": tiny.ids(8, 48), "attention_mask": torch.ones(8, 48, dtype=torch.long)}
    model, run = dense(name, family), Run(batches=[batch])
    for before, fields in own_fields(name, "BEFORE").items():
        build(before, fields).apply(model, run)
    return model, method(name, family).apply(model, run), run.scores


def dense(name: str, family: str):
    """The model before; one with gains and biases of its own for a transform to move."""
    return tiny.make(family, norms=llmopt.get(name).stage == "transform")


@torch.no_grad()
def behaviour(model) -> tuple[torch.Tensor, list]:
    """Logits of a prompt and of what is read after it, and a greedy text."""
    ids = tiny.ids(2, 64, seed=3)
    first = model(ids[:, :56], use_cache=True)
    second = model(ids[:, 56:], past_key_values=first.past_key_values).logits
    text = model.generate(ids[:, :56], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    return torch.cat([first.logits, second], 1), text.tolist()


@pytest.mark.parametrize(("name", "family"), pairs(NAMES))
def test_it_changes_something_measurable(name, family):
    model, record, scores = applied(name, family)
    if llmopt.get(name).stage == "score":
        found = scores[name]
        assert len(found) == 3
        assert all(torch.isfinite(s).all() and s.std() > 0 for s in found)
        assert torch.equal(behaviour(model)[0], behaviour(tiny.make(family))[0])
    elif llmopt.get(name).stage == "transform":
        before = dense(name, family)
        torch.testing.assert_close(behaviour(model)[0], behaviour(before)[0], rtol=0, atol=1e-4)
        assert any(not torch.equal(before.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    else:
        assert not torch.equal(behaviour(model)[0], behaviour(tiny.make(family))[0])
    json.dumps(record.meta)


@pytest.mark.parametrize(("name", "family"), pairs(NAMES))
def test_saved_and_loaded_equals_memory(name, family, tmp_path):
    model, _, _ = applied(name, family)
    unpacked = llmopt.get(name).stage == "quant" and (family, "quant.*") in REFUSED
    llmopt.save(model, tmp_path / "out", format="dense" if unpacked else "portable")
    fresh, _ = load(tmp_path / "out")
    (logits, text), (again, text_again) = behaviour(model), behaviour(fresh)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
    assert text_again == text


@pytest.mark.parametrize(("name", "family"), pairs(NAMES))
def test_the_same_seed_gives_the_same_record(name, family):
    (_, one, scores), (_, two, scores_again) = applied(name, family), applied(name, family)
    assert json.dumps(one.meta) == json.dumps(two.meta)
    assert one.tensors.keys() == two.tensors.keys()
    for key in scores:
        assert all(torch.equal(a, b) for a, b in zip(scores[key], scores_again[key], strict=True))


@pytest.mark.parametrize(("name", "family"), pairs([n for n in NAMES if llmopt.get(n).stage == "runtime"]))
def test_detached_is_dense_again(name, family):
    model, _, _ = applied(name, family)
    detach(model)
    logits, text = behaviour(model)
    expected, text_expected = behaviour(tiny.make(family))
    assert torch.equal(logits, expected)
    assert text == text_expected


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_field_names_itself(name):
    for item in dataclasses.fields(llmopt.get(name)):
        with pytest.raises(llmopt.LlmoptError) as caught:
            build(name, FIELDS.get(name, {}) | {item.name: object()})
        assert item.name in str(caught.value)
    with pytest.raises(llmopt.LlmoptError, match="'nonsense'"):
        build(name, {"nonsense": 1})
