"""Models that read images or sound: the language part is compressed, all else is carried over bit by bit."""
import json
import re

import pytest
import torch
from transformers import AutoConfig

import llmopt
from llmopt.errors import LlmoptError
from llmopt.files import shards, tensors
from llmopt.model.auto import auto_name
from llmopt.model.beside_text import carried
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.shapes import check_droppable
from llmopt.model.skeleton import skeleton
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from tests import seeing, warm
from tests.command import ROOT, call, command
from tests.plans import contents, plan

STEPS = {"rtn": "quant.rtn: {bits: 4, group_size: 16}", "gptq": "quant.gptq: {bits: 3, group_size: 16, sweeps: 0}",
         "blocks": "prune.depth: {ratio: 0.4}"}
DENSE = ("qwen3_vl_moe",)             # whose files keep a stack of experts in one tensor
STAY = {"gemma4": "has a part for each of them", "qwen3_5": "no layer with attention would remain",
        "qwen3_5_moe": "no layer with attention would remain", "llama4": "would be another one at place"}
CASES = [(kind, step) for kind in seeing.KINDS for step in STEPS if step != "blocks" or kind not in STAY]
LATER = ("llava_next", "llava_onevision", "smolvlm", "idefics3", "paligemma", "internvl", "mistral3",
         "qwen2_audio")                                                 # near relatives: in the full tier alone
QUICK = {(kind, [*STEPS][i % 2]) for i, kind in enumerate(seeing.KINDS) if kind not in LATER} | {
    ("llava", "blocks"), ("qwen3_vl", "blocks")}
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "auto_map": {"AutoImageProcessor": "foreign.Code"}}


def cases():
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.full) for case in CASES]


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """{(kind, step): (folder, its record, what plain transformers makes of it)}; every other one is streamed."""
    root, found = tmp_path_factory.mktemp("seeing"), {}
    for index, case in enumerate(CASES if request.config.getoption("--full") else [c for c in CASES if c in QUICK]):
        kind, step = case
        folder = root / f"{kind}-{step}"
        folder.mkdir()
        seeing.make(kind).save_pretrained(folder / "dense")
        (folder / "dense/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        recipe = plan(folder, folder / "dense", f"[{STEPS[step]}]", "format: dense\n" if kind in DENSE else "")
        report = pipeline.run(recipe, folder / "out", streaming=Streaming(index % 4 > 1, activations=1 << 14))
        found[case] = folder, report.records[0]["meta"]
    outs = [str(folder / "out") for folder, _ in found.values()]
    done = warm.run(ROOT / "tests" / "load_many.py", "see", root / "seen.pt", *outs, env=command()[1])
    assert not done.returncode, done.stderr
    seen = torch.load(root / "seen.pt")["see"]
    return {case: (folder, meta, seen[str(folder / "out")]) for case, (folder, meta) in found.items()}


@pytest.mark.parametrize(("kind", "step"), cases())
def test_plain_transformers_reads_it_and_finds_the_rest_as_it_was(made, kind, step):
    folder, meta, seen = made[kind, step]
    dense, after = seeing.make(kind), seen["weights"]
    before = dense.state_dict()
    names = {name for part in carried(dense) for name in before if name.startswith(f"{part}.")}
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    if step == "blocks":
        assert [layer["dropped"] for layer in meta["layers"]] == [False, True, False]
        shorter = {name for name in before if re.search(rf"{spec_of(dense).layers}\.[02]\.", name)}
        assert all(torch.equal(before[name], after[name.replace("layers.2.", "layers.1.")]) for name in shorter)
    else:
        assert {*meta["modules"]} == {p.name for block in blocks(dense) for group in block.weights() for p in group}
        alone = {name for name in before if name not in after}            # experts, which lie one by one where packed
        assert all(".experts." in name for name in alone) and (kind == "llama4") == bool(alone)
        changed = {name.removesuffix(".weight") for name in before.keys() - alone
                   if not torch.equal(before[name], after[name])}
        assert changed == {re.sub(r"\.\d+$", "", name) for name in meta["modules"]} - alone
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(seen["logits"], dense(ids).logits, atol=1e-3)
    assert seen["alone"] is None or torch.equal(seen["alone"], seen["logits"])
    assert torch.equal(llmopt.load(folder / "out")[0](ids).logits, seen["logits"])


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_files_beside_it_and_what_is_told(made, kind):
    folder, meta, _ = made[kind, "blocks"]
    kept = json.loads((folder / "out/preprocessor_config.json").read_text())
    assert kept == {"image_processor_type": "CLIPImageProcessor"}           # foreign code stays behind
    assert "AutoModelForImageTextToText.from_pretrained" in (folder / "out/README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in (folder / "out/README.md").read_text()


def test_show_says_what_is_compressed_and_what_is_carried_over(made, monkeypatch, capfd):
    folder, meta, _ = made["qwen2_vl", "rtn"]
    capfd.readouterr()
    assert call(monkeypatch, "show", folder / "dense", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["compressed"] == "model.language_model.layers" and told["carried"] == {"model.visual": 113_280}
    assert told["level"].startswith("weights; not run time: it reads more than text")
    assert meta["notes"] == ["carried over as it is: model.visual (113,280 weights)"]
    assert call(monkeypatch, "show", folder / "out", "--json") == 0
    assert json.loads(capfd.readouterr().out)["layers"] == 3


@pytest.mark.parametrize("step", [pytest.param("gptq", marks=pytest.mark.full), "blocks"])
@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("llava", marks=pytest.mark.full),
                                  pytest.param("smolvlm", marks=pytest.mark.full)])
def test_streamed_they_are_the_bytes_of_a_run_in_memory(kind, step, tmp_path):
    seeing.make(kind).save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    for name, force in (("memory", False), ("streamed", True)):
        pipeline.run(plan(tmp_path, tmp_path / "dense", f"[{STEPS[step]}]"), tmp_path / name,
                     streaming=Streaming(force, activations=1 << 14))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")


@pytest.mark.parametrize("streamed", [False, True])
def test_files_that_name_the_language_part_as_the_model_does(streamed, tmp_path):
    model = seeing.make("llava")
    model.save_pretrained(tmp_path / "dense")                   # language_model.model.layers, as in older files
    shards.write(tmp_path / "dense", model.state_dict(), "1GB")
    assert "model.language_model.layers.0.mlp.up_proj.weight" in tensors.places(tmp_path / "dense")
    pipeline.run(plan(tmp_path, tmp_path / "dense", f"[{STEPS['blocks']}]"), tmp_path / "out",
                 streaming=Streaming(streamed))
    found, kept = llmopt.load(tmp_path / "out")[0].state_dict(), model.state_dict()
    assert torch.equal(found["model.language_model.layers.1.mlp.up_proj.weight"],
                       kept["model.language_model.layers.2.mlp.up_proj.weight"])


def test_a_model_that_has_generated_is_saved_all_the_same(tmp_path):
    """It keeps how far the positions of the rows that it read last lie behind their tokens, of two rows here."""
    model = seeing.make("qwen2_5_vl")
    model.generate(torch.full((2, 5), 7), attention_mask=torch.ones(2, 5, dtype=torch.long), max_new_tokens=2)
    known = model.model.rope_deltas
    llmopt.save(model, tmp_path / "out")
    assert len(known) == 2 and model.model.rope_deltas is known


def test_a_tied_head_is_the_table_again(made):
    folder, _, seen = made["qwen2_5_vl", "gptq"]
    config = json.loads((folder / "out/config.json").read_text())
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [2, 3, 3]
    assert "lm_head.weight" not in tensors.places(folder / "out")
    table = seen["weights"]["model.language_model.embed_tokens.weight"]
    assert torch.equal(seen["weights"]["lm_head.weight"], table)


@pytest.mark.parametrize(("kind", "kept", "expected"), [
    ("qwen3_vl", [1, 2], "qwen3_vl: blocks cannot be pruned: the first 1 take in what the model sees"),
    ("gemma4", [0, 2], "gemma4: blocks cannot be pruned: model.language_model.embed_tokens_per_layer.weight has"),
    ("llama4", [0, 2], "llama4: blocks cannot be pruned: layer 2 would be another one at place 1")])
def test_blocks_that_cannot_leave_are_refused_by_name(kind, kept, expected):
    with pytest.raises(LlmoptError, match=re.escape(expected)):
        check_droppable(seeing.make(kind), kept)


@pytest.mark.parametrize(("kind", "expected"), [
    ("blip-2", "architecture 'blip-2' is not supported: it does not read tokens alone (pixel_values)"),
    ("kosmos-2", "architecture 'kosmos-2' is not supported: it does not read tokens alone (pixel_values)"),
    ("udop", "architecture 'udop' is not supported: it has an encoder"),
    ("idefics", "architecture 'idefics' is not supported: model.vision_model.encoder.layers and model.layers and")])
def test_what_cannot_be_compressed_is_refused_in_one_line(kind, expected):
    with pytest.raises(LlmoptError, match=re.escape(expected)):
        spec_of(skeleton(AutoConfig.for_model(kind), torch.float32))


@pytest.mark.parametrize(("kind", "named", "expected"), [
    ("llama4", "Llama4ForCausalLM", "AutoModelForCausalLM"), ("gemma3", None, "AutoModelForCausalLM"),
    ("llama4", "Llama4ForConditionalGeneration", "AutoModelForImageTextToText"),
    ("llama", None, "AutoModelForCausalLM"), ("qwen3_5", None, "AutoModelForImageTextToText"),
    ("qwen2_audio", None, "AutoModelForMultimodalLM")])
def test_the_class_that_makes_all_of_a_model(kind, named, expected):
    assert auto_name(kind, [named] if named else None) == expected
