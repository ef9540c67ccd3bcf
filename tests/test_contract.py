"""The contract, over every registered method and architecture: it changes something, comes back, repeats itself.

By default every method runs on Llama and on one other architecture, and every architecture under several methods;
--full runs all pairs. What an architecture refuses is read from the table in llmopt/model/README.md, which
test_architectures.py holds true.
"""
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import llmopt
from llmopt.calibration.logits_loss import outputs
from llmopt.checkpoint.save import load
from llmopt.method import Record, Run
from llmopt.model.experts import COUNTS
from llmopt.parts import build
from llmopt.runtime.attach import detach
from tests import table, tiny

REFUSED = {cell: reason for cell, reason in table.read().items() if reason}
REFUSED |= {(name, "experts"): "it has none" for name, config in tiny.CONFIGS.items()
            if not COUNTS & config.to_dict().keys()}
REFUSED |= {(name, f"quant.{solver}"): "it does not know experts" for solver in ("tune", "autoround")
            for name, config in tiny.CONFIGS.items() if COUNTS & config.to_dict().keys()}
REFUSED |= {(family, f"experts.{name}"): "it has no more than one for each token" for name in ("skip", "top_k")
            for family in tiny.CONFIGS if (family, "experts") in REFUSED or (family, name) == ("mixtral", "top_k")}
# Fields that suit the tiny models; others stand in the method's own test, tests/FAMILY/test_NAME.py, as CONTRACT. A
# method with neither runs with its defaults.
FIELDS = {
    "quant.rtn": {"bits": 3, "group_size": 32},
    "quant.gptq": {"bits": 3, "group_size": 32},
    "quant.weights": {"bits": 3, "group_size": 32, "solver": {"gptq": {"damping": 0.05}}},
    **{f"prune.{name}": {"ratio": 0.5} for name in ("fisher", "flap", "magnitude", "obs", "taylor", "wanda")},
    "kv.streaming": {"ratio": 0.5},
    "kv.snapkv": {"ratio": 0.5, "window": 8},
    **{f"kv.{name}": {"ratio": 0.5, "window": 8} for name in ("critical", "dropkv", "ems", "h2o")},
    **{f"kv.{name}": {"ratio": 0.5}
       for name in ("compactor", "keydiff", "knorm", "leverage", "noncausal", "random", "tova")},
    **{f"attention.{name}": {"block": 8, "min_length": 0} | fields for name, fields in {
        "anchor": {"step": 2, "theta": 0.5}, "block_topk": {"keep": 1}, "flash_prefill": {"near": 1, "dense": 0},
        "flexprefill": {"budget": 8, "gamma": 0.5}, "sparge": {"mass": 0.4}, "stem": {"stride": 4},
        "xattention": {"stride": 4, "threshold": 0.4}}.items()},
    **{f"attention.{name}": {"min_length": 0} | fields for name, fields in {
        "core_context": {"window": 8, "group": 4, "tile": 8}, "neighborhood": {"window": 12, "stride": 4},
        "s2": {"group": 16}, "tri_shape": {"sinks": 2, "window": 8, "dense": 4, "tile": 4},
        "vertical_slash": {"vertical": 6, "slash": 6, "always": 2, "tile": 8}}.items()},
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


def pairs(names: list[str], count: int = 2) -> list:
    """(method, architecture), all but `count` of a method marked for the full tier; no transform that is refused."""
    found = []
    for number, name in enumerate(names):
        families = [family for family in tiny.CONFIGS if has_units(name, family)]
        others = [family for family in OTHERS if family in families]
        default = ("llama", others[number % len(others)])[-count:]
        found += [pytest.param(name, family, marks=() if family in default else pytest.mark.full)
                  for family in families]
    return found


def test_every_architecture_is_among_the_pairs_of_the_default_tier():
    assert {param.values[1] for param in pairs(NAMES) if not param.marks} == {*tiny.CONFIGS}


def method(name: str, family: str):
    """The method with fields that suit the tiny models; pruning without the units that the architecture refuses."""
    made = build(name, FIELDS.get(name, {}))
    if made.stage == "prune" and "units" in made.to_dict()[name]:
        made = dataclasses.replace(made, units=tuple(u for u in made.units if (family, u) not in REFUSED))
    return made


def has_units(name: str, family: str) -> bool:
    """False where the architecture refuses the method, or all units of a pruner."""
    made = build(name, FIELDS.get(name, {})) if name.startswith("prune.") else None
    if (family, name) in REFUSED:
        return False
    return made is None or any((family, unit) not in REFUSED for unit in getattr(made, "units", [family]))


def family_for(name: str, usual: str) -> str:
    """The usual architecture, or one that has what the method acts on."""
    return usual if has_units(name, usual) else "qwen3_moe"


class Applied(NamedTuple):
    """A model after the method alone; logits, text: see behaviour."""

    model: nn.Module
    record: Record
    scores: dict[str, list[torch.Tensor]]
    logits: torch.Tensor
    text: list


def applied(name: str, family: str) -> tuple[nn.Module, Record, dict]:
    batch = {"input_ids": tiny.ids(8, 48), "attention_mask": torch.ones(8, 48, dtype=torch.long)}
    model, run = dense(name, family), Run(batches=[batch])
    run.dense = outputs(model, run.batches) if llmopt.get(name).recalls else None
    for before, fields in own_fields(name, "BEFORE").items():
        build(before, fields).apply(model, run)
    return model, method(name, family).apply(model, run), run.scores


def moves_norms(name: str) -> bool:
    """True for a transform, whose model has gains and biases of its own for it to move."""
    return llmopt.get(name).stage == "transform"


def dense(name: str, family: str) -> nn.Module:
    return tiny.make(family, norms=moves_norms(name))


@torch.no_grad()
def behaviour(model) -> tuple[torch.Tensor, list]:
    """Logits of a prompt and of what is read after it, and a greedy text."""
    ids = tiny.ids(2, 64, seed=3)
    first = model(ids[:, :56], use_cache=True)
    second = model(ids[:, 56:], past_key_values=first.past_key_values).logits
    text = model.generate(ids[:, :56], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return torch.cat([first.logits, second], 1), text.tolist()


@functools.cache
def behaviour_before(family: str, norms: bool) -> tuple[torch.Tensor, list]:
    return behaviour(tiny.make(family, norms=norms))


@pytest.fixture(scope="module")
def made(name, family) -> Applied:
    """A pair of the contract; tests leave it as it is."""
    model, *found = applied(name, family)
    return Applied(model, *found, *behaviour(model))


every_pair = pytest.mark.parametrize(("name", "family"), pairs(NAMES), scope="module")
each_once = pytest.mark.parametrize(("name", "family"), pairs(NAMES, count=1), scope="module")


@every_pair
def test_it_changes_something_measurable(name, family, made):
    logits, _ = behaviour_before(family, moves_norms(name))
    if llmopt.get(name).stage == "score":
        found = made.scores[name]
        assert len(found) == 3
        assert all(torch.isfinite(s).all() and s.std() > 0 for s in found)
        assert torch.equal(made.logits, logits)
    elif moves_norms(name):
        torch.testing.assert_close(made.logits, logits, rtol=0, atol=1e-4)
        before = dense(name, family).state_dict()
        assert any(not torch.equal(before[key], tensor) for key, tensor in made.model.state_dict().items())
    else:
        assert not torch.equal(made.logits, logits)
    json.dumps(made.record.meta)


@every_pair
def test_saved_and_loaded_equals_memory(name, family, made, tmp_path):
    unpacked = llmopt.get(name).stage == "quant" and (family, "quant.*") in REFUSED
    llmopt.save(made.model, tmp_path / "out", format="dense" if unpacked else "portable")
    logits, text = behaviour(load(tmp_path / "out")[0])
    torch.testing.assert_close(logits, made.logits, rtol=0, atol=1e-5)
    assert text == made.text


@each_once
def test_the_same_seed_gives_the_same_record_and_detached_is_dense_again(name, family, made):
    model, record, scores = applied(name, family)
    assert json.dumps(made.record.meta) == json.dumps(record.meta)
    assert made.record.tensors.keys() == record.tensors.keys()
    for key in made.scores:
        assert all(torch.equal(a, b) for a, b in zip(made.scores[key], scores[key], strict=True))
    if llmopt.get(name).stage == "runtime":
        detach(model)
        (logits, text), (expected, expected_text) = behaviour(model), behaviour_before(family, False)
        assert torch.equal(logits, expected) and text == expected_text


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_field_names_itself(name):
    for item in dataclasses.fields(llmopt.get(name)):
        with pytest.raises(llmopt.LlmoptError) as caught:
            build(name, FIELDS.get(name, {}) | {item.name: object()})
        assert item.name in str(caught.value)
    with pytest.raises(llmopt.LlmoptError, match="'nonsense'"):
        build(name, {"nonsense": 1})
