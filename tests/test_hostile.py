"""Hostile folders: whatever a stranger puts there, a command works or ends in one line, in bounded time and memory."""
import json
import shutil
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmopt
from llmopt.checkpoint import facts
from llmopt.checkpoint.look import checkpoint_facts
from llmopt.cli import contents
from llmopt.errors import LlmoptError
from llmopt.files import checks
from llmopt.files import limited as limits
from llmopt.files.limited import limited
from tests import hostile, hostile_runs, tiny

CORE = {                # a case of every kind and the command that meets it: a few seconds in all
    "template_loops": "chat", "template_doubles": "chat", "template_width": "chat", "template_name_above": "compress",
    "normalizer_grows": "heads", "split_catastrophic": "compress", "header_of_lists": "heads",
    "layers_a_billion": "from_pretrained", "layer_types_a_million": "compress",
    "config_long": "show", "fifo_for_tokenizer": "heads", "endless_config": "compress",
    "shares_missing": "from_pretrained", "shares_of_fewer_layers": "from_pretrained", "shares_nan": "eval",
    "shares_of_text": "from_pretrained", "steps_many": "from_pretrained", "step_of_weights": "from_pretrained",
    "key_a_number": "from_pretrained", "tensors_many": "from_pretrained", "tensors_huge": "from_pretrained",
    "tensors_deep": "from_pretrained", "tensors_of_code": "from_pretrained", "facts_shares_wide": "show",
    "facts_records_many": "show", "facts_of_lists": "show", "facts_shares_nan": "show", "facts_deep": "show",
    "facts_shares_missing": "show", "facts_shares_of_fewer_layers": "show", "facts_scores_of_text": "show",
    "facts_bits_missing": "show", "facts_fields_wrong": "show", "facts_fields_deep": "show"}
COMMANDS = ("chat", "compress", "show", "eval", "heads", "from_pretrained")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    hostile_runs.make(folder)
    return folder


def test_the_table_is_long():
    assert len({*hostile.DENSE, *hostile.MADE}) >= 60


@pytest.mark.parametrize("name", CORE)
def test_a_hostile_folder_is_one_line(home, name, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1)
    ended = hostile_runs.run(home, name, [CORE[name]])[CORE[name]]
    assert not ended.fault, ended.fault
    assert ended.code == 2, ended


@pytest.mark.full
@pytest.mark.parametrize("name", [*hostile.DENSE, *hostile.MADE])
def test_every_command_on_every_hostile_folder(home, name):
    found = hostile_runs.run(home, name, [what for what in COMMANDS if what != "chat" or name.startswith("template")])
    assert not {what: ended.fault for what, ended in found.items() if ended.fault}


# ------------------------------------------------------------------------------------- what honest models have passes

def test_a_header_of_100_000_tensors_is_read(tmp_path):
    entries = {f"model.layers.{i % 60}.mlp.experts.{i // 60}.gate_proj.weight": {
        "dtype": "BF16", "shape": [1, 2], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(400_000))
    assert len(checks.check_safetensors(tmp_path / "model.safetensors")) == 100_000
    names = {name: f"model-{i % 160:05d}-of-00160.safetensors" for i, name in enumerate(entries)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(checks.indexed(tmp_path / "model.safetensors.index.json")) == 160


def test_a_long_honest_template_is_rendered(home, tmp_path):
    branches = "".join(f"{{% if m['role'] == 'r{i}' %}}role {i} {{% endif %}}" for i in range(500))
    template = "{% for m in messages %}" + branches + "{{ m['content'] }} {% endfor %}"
    assert len(template) > 20_000
    hostile.DENSE["template_honest"] = hostile.template(template)
    try:
        ended = hostile_runs.run(home, "template_honest", ["chat"])["chat"]
    finally:
        del hostile.DENSE["template_honest"]
    assert ended.code == 0, ended


def test_a_child_with_limits_gives_what_it_computes_and_says_why_it_does_not(monkeypatch):
    assert limited(lambda: [1, "é", None], "it") == [1, "é", None]

    monkeypatch.setattr(limits, "SECONDS", 1)

    def endless():
        while True:
            pass

    for act, said in ((endless, "it: takes more than 1 s"), (lambda: bytes(10**10), "it: takes more than 0.5 GB of"),
                      (lambda: {}["x"], "it: unknown or missing key 'x'"), (object, "it: takes more than 0")):
        with pytest.raises(LlmoptError, match=said):
            limited(act, "it")


def test_the_record_of_a_method_that_is_not_known_here_is_shown(home, tmp_path, capsys):
    shutil.copytree(home / "done", tmp_path / "done")
    hostile.facts("records", 2, "method", "quant.of_tomorrow")(tmp_path / "done")
    hostile.facts("records", 2, "fields", {"colour": "red"})(tmp_path / "done")
    contents.show_checkpoint(checkpoint_facts(tmp_path / "done", facts.read_facts(tmp_path / "done")), as_json=False)
    assert "quant.of_tomorrow" in capsys.readouterr().out


def test_a_record_is_checked_when_it_is_restored_and_an_honest_one_passes(home):
    assert AutoModelForCausalLM.from_pretrained(home / "done")(tiny.ids(1, 8)).logits.isfinite().all()
    model = tiny.make("llama")
    step = llmopt.kv.SnapKV(ratio=0.5, allocate="heads", heads="heads.span")
    for meta in ({}, {"shares": [[1.0, 2.0]]}, {"shares": [[1.0, float("nan")]] * 3}, {"shares": [[1.0]] * 3}):
        with pytest.raises(LlmoptError, match="shares"):
            step.restore(model, llmopt.Record(meta))
    step.restore(model, llmopt.Record({"shares": [[1.0, 2.0]] * 3}))
    assert torch.isfinite(model(tiny.ids(1, 8)).logits).all()
