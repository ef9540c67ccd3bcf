"""Embeddings and heads of fewer bits: in plain transformers, streamed, resumed, foretold."""
import json
from pathlib import Path

import pytest
import torch

import llmopt
from llmopt.checkpoint.facts import read_facts
from llmopt.checkpoint.look import checkpoint_facts
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.loaded import forget_codes
from llmopt.quant import GPTQ, RTN, vocabulary
from llmopt.quant.making import Making
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from llmopt.scale.journal import Interrupted
from tests import warm
from tests.command import ROOT, command
from tests.plans import contents, dense, plan
from tests.quant.quant_data import batches, loaded_plain
from tests.tiny import ids, make

E8, E4, BF16 = {"bits": 8}, {"bits": 4}, torch.bfloat16
CASES = {
    "tied8": ("llama", BF16, RTN(group_size=32, embedding=E8), {}),
    "tied8-fp32": ("gemma3_text", torch.float32, RTN(group_size=32, embedding=E8, overrides={"mlp": {"bits": 3}}), {}),
    "tied4": ("llama", torch.float32, GPTQ(group_size=32, embedding=E4), {}),
    "zeros": ("llama", torch.float16, RTN(group_size=32, embedding=E4, symmetric=False), {}),
    "untied": ("qwen2", BF16, RTN(group_size=32, embedding=E8, head={"bits": 3}), {"tie_word_embeddings": False}),
    "untied4": ("qwen2", BF16, RTN(group_size=32, embedding=E4, head=E4), {"tie_word_embeddings": False}),
    "floats": ("llama", BF16, RTN(scheme="FP8_DYNAMIC", embedding=E8), {}),
    "opt": ("opt", torch.float32, RTN(group_size=16, embedding=E8), {}),
}


def size(folder) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def saved_as_foretold(cases: dict, place) -> dict:
    """{folder: model in memory} of compressed models, whose files have the size that was foretold."""
    saved = {}
    for name, (family, dtype, step, changes) in cases.items():
        model = make(family, dtype, **changes)
        told = predict(model, [step])
        llmopt.compress(model, [step], batches=batches())
        llmopt.save(model, place / name)
        assert size(place / name) == told.bytes, name
        saved[str(place / name)] = model
    return saved


def test_plain_transformers_loads_them_exactly_at_the_size_foretold(tmp_path):
    for folder, plain, expected in loaded_plain(saved_as_foretold(CASES, tmp_path), tmp_path):
        assert torch.equal(plain, expected), folder


@pytest.mark.parametrize(("fields", "says"), [
    ({"embedding": {"bits": 6}, "symmetric": False}, "like all other weights in bits and groups beside weights that"),
    ({"embedding": E4, "symmetric": False, "overrides": {"mlp": {"bits": 3}}}, "like all other weights in bits"),
    ({"embedding": E8, "symmetric": False}, "use symmetric: true"),
    ({"embedding": E4, "scale_dtype": "float16"}, "scale_dtype: 'float16' given, float32, the model's type"),
    ({"head": E4}, "head: .* tied to the embedding")])
def test_what_plain_transformers_would_load_otherwise_is_refused_beforehand(fields, says):
    with pytest.raises(LlmoptError, match=says):
        predict(make("llama"), [RTN(group_size=32, **fields)])


OURS = {
    "tied": ("llama", BF16, GPTQ(bits=3, group_size=32, embedding={"bits": 6}), {}),
    "scaled": ("gemma3_text", torch.float32, RTN(group_size=32, embedding={"bits": 6}), {}),
    "untied": ("qwen2", BF16, RTN(group_size=32, embedding={"bits": 5}, head=E4), {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Embeddings at few bits beside weights of other settings."""
    return saved_as_foretold(OURS, tmp_path_factory.mktemp("ours"))


def test_beside_other_weights_llmopt_loads_them_exactly_and_saves_them_as_small(ours, tmp_path):
    for folder, model in ours.items():
        loaded, _ = llmopt.load(folder)
        with torch.no_grad():
            assert torch.equal(loaded(ids(2, 40)).logits, model(ids(2, 40)).logits), folder
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
        again = tmp_path / Path(folder).name
        loaded.save_pretrained(again)
        assert size(again) == size(Path(folder))
        assert torch.equal(llmopt.load(again)[0].get_input_embeddings().weight, model.get_input_embeddings().weight)
        with pytest.raises(LlmoptError, match="embed_tokens cannot stay packed: it is a table of less than 8 bits"):
            llmopt.load(folder, packed=True)


def test_plain_transformers_refuses_them_and_the_card_says_so(ours, tmp_path):
    seen = tmp_path / "seen.pt"
    done = warm.run(ROOT / "tests" / "load_many.py", "plain", seen, *ours, env=command()[1])
    assert done.returncode == 0, done.stderr
    for folder, told in torch.load(seen)["plain"].items():
        assert "has no attribute 'weight'" in told["error"], (folder, told)
        card = (Path(folder) / "README.md").read_text()
        assert "**Its embedding is packed, at less than 8 bits**: plain transformers refuses it" in card
        assert "| transformers | refused: an embedding of less than 8 bits |" in card and "\nimport llmopt\n" in card


def test_only_numbers_of_bits_are_taken():
    for wrong in (8, {"bits": 9}, {"bits": 1}, {"bits": "few"}, {}, {"bits": 8, "group_size": 32}):
        with pytest.raises(LlmoptError, match="embedding"):
            RTN(embedding=wrong)


PLANS = {
    "tied": ("llama", "[quant.rtn: {group_size: 32, embedding: {bits: 8}}]", "", {"tie_word_embeddings": True}),
    "beside": ("llama", "[quant.rtn: {bits: 4, group_size: 32, embedding: {bits: 6}}]", "", {}),
    "alike": ("llama", "[quant.gptq: {bits: 3, group_size: 32, sweeps: 0, clip: false, embedding: {bits: 3}}]", "",
              {}),
    "rotated": ("llama", "[transform.rotate: {}, quant.rtn: {group_size: 32, embedding: {bits: 8}, head: {bits: 5}}, "
                         "kv.streaming: {budget: 16}]", "", {"tie_word_embeddings": True}),
    "dense": ("gpt2", "[quant.rtn: {group_size: 32, embedding: {bits: 6}}]", "format: dense\n", {}),
    "buffers": ("gemma3_text", "[quant.rtn: {group_size: 32, embedding: {bits: 8}}]", "", {})}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in ("tied", "dense") else name
                                  for name in PLANS])
def test_streamed_and_resumed_runs_write_the_bytes_of_one_in_memory(name, tmp_path, monkeypatch):
    family, steps, extra, changes = PLANS[name]
    made = plan(tmp_path, dense(tmp_path, family, **changes), steps, extra)
    pipeline.run(made, tmp_path / "whole", streaming=Streaming(False))
    pipeline.run(made, tmp_path / "streamed", streaming=Streaming(True))
    write, solve, written, left = vocabulary._write, Making._solve, [], [9]

    def cut(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(vocabulary, "_write", lambda weight, spec: (written.append(weight.name), write(weight, spec)))
    monkeypatch.setattr(Making, "_solve", cut)
    with pytest.raises(Interrupted):
        pipeline.run(made, tmp_path / "resumed", streaming=Streaming(False))
    first = list(written)
    pipeline.run(made, tmp_path / "resumed", streaming=Streaming(True), resume=True)
    assert written == first != []
    whole = contents(tmp_path / "whole")
    for other in ("streamed", "resumed"):
        found = contents(tmp_path / other)
        assert found.keys() == whole.keys()
        assert not [file for file in whole if found[file] != whole[file]], other


def test_a_loaded_one_is_saved_again_as_small_with_its_head_tied(tmp_path):
    model = make("llama", BF16)
    llmopt.compress(model, [RTN(group_size=32, embedding=E8)])
    llmopt.save(model, tmp_path / "first")
    loaded, _ = llmopt.load(tmp_path / "first")
    loaded(ids(1, 8))
    loaded.save_pretrained(tmp_path / "second")
    assert size(tmp_path / "second") == size(tmp_path / "first")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["tie_word_embeddings"]
    again, _ = llmopt.load(tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(again(ids(2, 40)).logits, model(ids(2, 40)).logits)
    forget_codes(again)
    again.save_pretrained(tmp_path / "dense")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert size(tmp_path / "dense") == predict(make("llama", BF16), []).bytes


def test_the_record_tells_of_the_embedding(tmp_path):
    model = make("llama", BF16)
    record = RTN(group_size=32, embedding=E8).apply(model, Run())
    told = record.meta["modules"]["model.embed_tokens"]
    assert told["bits"] == 8 and 0 < told["weight_error"] < 1e-4
    assert record.meta["bits"] == 4
    llmopt.save(model, tmp_path / "out")
    assert checkpoint_facts(tmp_path / "out", read_facts(tmp_path / "out"))["bits"] == {"4": 21, "8": 2}


def test_a_budget_of_bytes_counts_the_embedding(tmp_path):
    model = make("llama", BF16)
    most = predict(make("llama", BF16), [RTN(bits=3, group_size=32, embedding=E8)]).bytes + 2000
    step = RTN(group_size=32, allocate="sensitivity", bytes=most, embedding=E8)
    assert most - 3000 < predict(model, [step]).bytes <= most
    llmopt.compress(model, [step], batches=batches())
    llmopt.save(model, tmp_path / "out")
    assert most - 3000 < size(tmp_path / "out") <= most
