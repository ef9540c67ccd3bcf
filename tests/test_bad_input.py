"""Everything a hostile or clumsy user may hand in: one line that names it, exit code 2, nothing written."""
import json
import os
import shutil
import struct

import pytest
import torch
from llmopt_evals.world.tokenizer import save_tokenizer
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.command import call

RTN = "steps:\n  - quant.rtn: {bits: 4, group_size: 16}\n"
GPTQ = "steps:\n  - quant.gptq: {bits: 4, group_size: 16}\n"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A tiny Llama that speaks the world's vocabulary, in one file and in shards."""
    folder = tmp_path_factory.mktemp("pristine")
    for name, size in (("whole", "1GB"), ("shards", "100KB")):
        tiny.make("llama", vocab_size=512).save_pretrained(folder / name, max_shard_size=size)
        save_tokenizer(folder / name)
    return folder


@pytest.fixture
def model(pristine, tmp_path):
    shutil.copytree(pristine / "whole", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(pristine, tmp_path):
    shutil.copytree(pristine / "shards", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(scope="session")
def finished(pristine):
    """A checkpoint, with its table."""
    (pristine / "r.yaml").write_text(RTN)
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "compress", "--recipe", pristine / "r.yaml", "--model", pristine / "whole",
                    "--output", pristine / "done") == 0
    return pristine / "done"


@pytest.fixture
def compressed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "done")
    return tmp_path / "done"


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Run the command and return its one line; fails if anything was written or the exit code is not 2."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> str:
        before = sorted(p for p in tmp_path.rglob("*"))
        capfd.readouterr()
        code = call(monkeypatch, *words)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("error: ")
        assert sorted(p for p in tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def compress(refused, tmp_path):
    """Compress a model into ./out by a recipe's text; the error."""

    def run(model, *words, text=RTN) -> str:
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return refused("compress", "--recipe", "r.yaml", "--model", model, "--output", "out", *words)

    return run


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("text", "expected"), [
    (b"\xff\xfe\x00", "r.yaml: not UTF-8"),
    (b"steps: [\x00]", "r.yaml:1: not valid YAML"),
    (b"", "steps"),
    (b"- a\n", "a recipe is a mapping"),
    (b"steps: quant.rtn\n", "steps: a list"),
    (b"steps:\n\t- quant.rtn\n", "r.yaml:2: not valid YAML"),
    (b"steps: [quant.rtn]\nsteps: [quant.rtn]\n", "r.yaml:2: the key 'steps' is given twice"),
    (b"seed: !!python/object:os.system x\nsteps: [quant.rtn]\n", "r.yaml:1"),
    (b"seed: 2020-99-99\nsteps: [quant.rtn]\n", "month must be"),
    (b"steps:\n  - quant.rtm: {}\n", "did you mean 'quant.rtn'"),
])
def test_recipes(compress, model, text, expected):
    assert expected in compress(model, text=text)


@pytest.mark.parametrize(("assignment", "expected"), [
    ("", "KEY=VALUE"), ("=3", "unknown key ''"), ("steps.0.bits", "KEY=VALUE"), ("steps.9.bits=3", "no step 9"),
    ("steps.0.bits.x=3", "no keys"), ("steps.0.bits=[", "not valid YAML"), ("model.colour=red", "'colour'"),
    ("steps.0.bits=0", "bits: 0"), ("steps.0.bits=17", "bits: 17"), ("steps.0.bits=.nan", "a finite number"),
    ("steps.0.bits=true", "bits: True"), ("steps.0.bit=3", "did you mean 'bits'"),
    ("steps.0.group_size=7", "group_size 7 does not divide"), ("steps.0.group_size=0", "group_size: 0"),
    ("steps.0.ignore=[nothing]", "'nothing'"), ("steps.0.ignore=['*']", "nothing is left"),
    ("steps.0={quant.tune: {minutes: 0}}", "minutes: 0"), ("steps.0={quant.tune: {start: gtpq}}", "start: 'gtpq'"),
    ("steps.0={quant.autoround: {iterations: -1}}", "iterations: -1"),
    ("steps.0={kv.snapkv: {ratio: 1.0}}", "ratio: 1.0"), ("steps.0={prune.magnitude: {ratio: -1}}", "ratio: -1"),
    ("eval.tasks=[world_pbl]", "did you mean 'world_ppl'"), ("eval.limit=0", "limit: 0"),
    ("eval.batch_size=0", "batch_size: 0"), ("seed=-1", "seed: -1"), ("data.samples=0", "samples: 0"),
    ("model.dtype=int8", "one of float32, bfloat16, float16"), ("model.device=cuda:99", "device 'cuda:99'"),
    ("model.device=cudaa", "device 'cudaa'"),
    ("model.device=gpu", "device 'gpu' is not known (did you mean 'cuda'?)"), ("model.device=meta", "device 'meta'"),
    ("max_shard_size=0GB", "'0GB'"), ("format=gguf", "format: 'gguf' given, one of portable, dense"),
])
def test_overrides(compress, model, assignment, expected):
    assert expected in compress(model, "--set", assignment)


@pytest.mark.parametrize(("words", "expected"), [
    (["compres"], "Did you mean 'compress'"),
    (["compress", "--recipe", "quickstrat", "--output", "o"], "did you mean 'quickstart'"),
    (["compress", "--recipe", ".", "--output", "o"], "no recipe '.'"),
    (["compress", "--recipe", "rtn"], "--output FOLDER is needed"),
    (["compress"], "--recipe"),
    (["eval", "nowhere/at-all", "--tasks", "world_ppl"], "nowhere/at-all"),
    (["eval", "./nowhere", "--tasks", "world_ppl"], "not a model folder"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--compare", "./nowhere"], "not a model folder"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--compare", ""], "id: ''"),
    (["eval", "llmopt/reference", "--tasks", ","], "names no task"),
    (["eval", "llmopt/reference", "--tasks", "world_pbl"], "world_pbl"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--limit", "0"], "0 is not in the range"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--batch-size", "0"], "a number from 1, auto"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--device", "cudaa"], "cudaa"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--dtype", "int3"], "int3"),
    (["eval", "llmopt/reference", "--tasks", "world_ppl", "--output", "no/such/place.json"], "does not exist"),
    (["heads", "llmopt/reference", "--method", "heads.spam"], "did you mean 'heads.span'"),
    (["heads", "llmopt/reference", "--method", "quant.rtn"], "is not a head score"),
    (["heads", "llmopt/reference", "--set", "window"], "FIELD=VALUE"),
    (["heads", "llmopt/reference", "--set", "colour=red"], "'colour'"),
    (["heads", "llmopt/reference", "--plot", "h.doc"], ".png"),
    (["heads", "llmopt/reference", "--output", "scores.txt"], ".json or .safetensors"),
    (["heads", "llmopt/reference", "--correlate"], "give --method at least twice"),
    (["heads", "llmopt/reference", "--method", "heads.span", "--method", "none.json", "--correlate"], "none.json"),
    (["heads", "llmopt/reference", "--method", "heads.span", "--method", "heads.need90", "--plot", "h.png"],
     "of one --method"),
    (["heads", "llmopt/reference", "--ablate", "0"], "0 is not in the range"),
    (["heads", "llmopt/reference", "--samples", "1", "--ablate", "2.5"], "a share below 1 expected, or a number"),
    (["heads", "llmopt/reference", "--samples", "1", "--ablate", "30"], "up to 24, half of the model's 48"),
    (["heads", "llmopt/reference", "--samples", "1", "--ablate", "1", "--tasks", "world_pbl"], "world_pbl"),
    (["heads", "llmopt/reference", "--data", "no.txt"], "no such file"),
    (["heads", "./nowhere"], "not a model folder"),
    (["show", "nowhere"], "nowhere"),
    (["methods", "quant.rtm"], "did you mean 'quant.rtn'"),
    (["push", "nowhere", "a/b"], "nowhere"),
])
def test_words(refused, words, expected):
    assert expected in refused(*words)


def test_show_and_push_want_a_checkpoint(refused, model):
    assert "no llmopt.json; this is not a checkpoint written by llmopt" in refused("push", model, "user/repo")
    (model / "llmopt.json").write_text("{")
    assert "llmopt.json: not JSON" in refused("show", model)
    assert "llmopt.json: not JSON" in refused("push", model, "user/repo")


def test_places(compress, model, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    os.symlink(model, tmp_path / "link")
    assert "is a file" in compress(model, "--output", tmp_path / "file")
    assert "is a file" in compress(model, "--output", tmp_path / "file" / "out")
    assert "is not empty" in compress(model, "--output", tmp_path / "full")
    assert "not a checkpoint" in compress(model, "--output", tmp_path / "full", "--overwrite")
    assert "inside the model's folder" in compress(model, "--output", model / "out")
    assert "inside the model's folder" in compress(tmp_path / "link", "--output", model / "out")
    assert "too long" in compress(model, "--output", "x" * 300)


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("config.json", None, "no config.json"),
    ("config.json", b"{", "config.json: not JSON"),
    ("config.json", b"\xff\xfe", "config.json: not JSON"),
    ("config.json", b"[]", "not a JSON mapping"),
    ("config.json", b"{}", "model_type"),
    ("tokenizer.json", b"{broken", "tokenizer.json: not JSON"),
    ("tokenizer.json", b"{}", "the tokenizer cannot be loaded"),
    ("tokenizer.json", None, "the tokenizer cannot be loaded"),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json: not a JSON mapping"),
    ("model.safetensors", b"", "not a safetensors file"),
    ("model.safetensors", None, "no model.safetensors"),
])
def test_a_file_of_the_model(compress, model, name, content, expected):
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    assert expected in compress(model)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"model_type": "lama"}, "lama"),
    ({"model_type": "bitnet"}, "architecture 'bitnet' is not supported: its weights are ternary already"),
    ({"model_type": "bert"}, "architecture 'bert' is not supported"),
    ({"model_type": "t5"}, "architecture 't5' is not supported"),
    ({"hidden_size": 10**9}, "embed_tokens.weight is [512, 64], the config wants [512, 1000000000]"),
    ({"intermediate_size": 97}, "down_proj.weight is [64, 96], the config wants [64, 97]"),
    ({"num_hidden_layers": 4}, "9 tensors missing, such as model.layers.3."),
    ({"num_hidden_layers": 2}, "unknown to the config, such as model.layers.2."),
    ({"tie_word_embeddings": False}, "lm_head.weight"),
    ({"num_attention_heads": 0}, "zero"),
    ({"vocab_size": 96}, "embed_tokens.weight is [512, 64]"),
    ({"max_position_embeddings": 0}, "fewer than 2 tokens"),
    ({"hidden_act": "foo"}, "'foo'"),
    ({"head_dim": "x"}, "head_dim"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "already quantized"),
])
def test_a_config_that_does_not_fit(compress, model, changes, expected):
    edit(model, **changes)
    assert expected in compress(model)


def test_folders_of_other_kinds(compress, model, tmp_path):
    (model / "model.safetensors").rename(model / "m.gguf")
    assert "m.gguf: not a GGUF file" in compress(model)
    (model / "m.gguf").rename(model / "pytorch_model.bin")
    assert "pickled" in compress(model)
    (model / "config.json").rename(model / "adapter_config.json")
    assert "is an adapter: give its model" in compress(model)
    assert "not a model folder" in compress(model / "tokenizer.json")
    assert "''" in compress("")
    assert "a b c: not a folder" in compress("a b c")


def test_shards(compress, sharded):
    index, shard = sharded / "model.safetensors.index.json", sorted(sharded.glob("model-*"))[1]
    whole, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[:-100])
    assert f"{shard.name}: header says" in compress(sharded)
    shard.unlink()
    assert f"{shard.name}: listed in the index and missing" in compress(sharded)
    shard.write_bytes(whole)
    for broken in ("{", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(broken)
        assert "index.json" in compress(sharded)
    index.write_text(listed)


@pytest.mark.parametrize("damage", [
    {"dtype": "X9"}, {"shape": None}, {"shape": [7]}, {"data_offsets": [0, 8]}, {"data_offsets": [-8, 8]},
    {"data_offsets": "ab"}, {"data_offsets": []},
])
def test_a_safetensors_header_that_lies(compress, model, damage):
    file = model / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    header["model.norm.weight"] |= damage
    made = json.dumps({k: {a: b for a, b in v.items() if b is not None} for k, v in header.items()}).encode()
    file.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size:])
    assert str(model) in compress(model)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
def test_damaged_values(compress, model, poison):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = poison
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in compress(model)


def test_a_tokenizer_of_another_model(compress, model):
    small = tiny.make("llama")
    small.save_pretrained(model)
    assert "belong to different models" in compress(model)


@pytest.mark.parametrize(("source", "content", "expected"), [
    ("text", b"", "the file is empty"),
    ("text", b" \n\n<|endoftext|>\n ", "no document of at least 2 tokens"),
    ("text", b"\xff\xfe\xfa the fox", "not UTF-8 text (byte 0)"),
    ("text", b"the fox runs .", "too short: 5 tokens"),
    ("jsonl", b'{"a": "the fox"}\n', "no column 'text' (it has: a); data.column names another"),
    ("jsonl", b'{"text": 1}\n', "'text' holds 1, text expected"),
    ("jsonl", b'{"text": [{"role": "user", "content": "x"}]}\n', "text expected; data.template: chat takes conv"),
    ("jsonl", b"{\n", "line 1: not JSON"),
    ("chat", b'{"text": [{"role": "user"}]}\n', "{role, content} expected"),
    ("chat", b'{"text": [3]}\n', "{role, content} expected"),
    ("ids", b"[1, 2, 999999]\n", "token id 999999 does not fit"),
    ("ids", b"[1, 2, -1]\n", "token id -1 does not fit"),
    ("ids", b"[1, 99999999999999999999999]\n", "does not fit"),
    ("ids", b"[1, 2.5]\n", "line 1 is not a list of token ids"),
    ("ids", json.dumps([5] * 300).encode(), "a row has 300 tokens, but the model reads at most 256"),
    ("long", b"the fox runs .", "data.length is 100000, but the model reads at most 256"),
])
def test_calibration_data(compress, model, tmp_path, source, content, expected):
    file = tmp_path / ("d.txt" if source in ("text", "long") else "d.jsonl")
    file.write_bytes(content)
    name = "ids" if source == "ids" else "text"
    more = {"chat": ", template: chat", "long": ", length: 100000"}.get(source, "")
    error = compress(model, text=f"data: {{name: {name}, path: {file}{more}}}\n{GPTQ}")
    assert expected in error
    assert str(file) in error or source == "long"


def test_more_text_than_memory_is_not_made(compress, model):
    assert "samples: 1000000000" in compress(model, text="data: {samples: 1000000000}\n" + GPTQ)
    error = compress(model, text="data: {samples: 1000000, length: 256}\n" + GPTQ)
    assert "1,000,000 samples of 256 tokens are too many" in error


def test_text_that_is_no_text_names_its_line(compress, model, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "the fox"}\n{"text": "half \\ud83d"}\n')
    assert "line 2: not JSON" in compress(model, text="data: {name: text, path: d.jsonl}\n" + GPTQ)
    (tmp_path / "d.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    assert "line 1: not JSON" in compress(model, text="data: {name: text, path: d.jsonl}\n" + GPTQ)
    (tmp_path / "d.jsonl").write_text("[" * 100_000 + "\n")
    assert "line 1: not JSON" in compress(model, text="data: {name: text, path: d.jsonl}\n" + GPTQ)


def test_names_with_terminal_codes_stay_names(compress, model, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a\\nb\\u001b[31m": 1}\n')
    assert r"a b\x1b[31m" in compress(model, text="data: {name: text, path: d.jsonl}\n" + GPTQ)


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda f: f.pop("bytes"), "bytes is missing"),
    (lambda f: f.update(bytes="many"), "bytes is 'many'"),
    (lambda f: f.update(format_version=2), "of a newer llmopt"),
    (lambda f: f["records"][0].pop("method"), "records.0.method is missing"),
    (lambda f: f["records"][0]["meta"].update(modules=[1]), "records.0.meta.modules is '[1]'"),
    (lambda f: f["table"].append(["x"]), "table."),
])
def test_a_damaged_llmopt_json_names_the_place(refused, compressed, damage, expected):
    facts = json.loads((compressed / "llmopt.json").read_text())
    damage(facts)
    (compressed / "llmopt.json").write_text(json.dumps(facts))
    assert expected in refused("show", compressed)


def test_a_damaged_llmopt_json_cannot_be_resumed(refused, pristine, compressed):
    facts = json.loads((compressed / "llmopt.json").read_text())
    (compressed / "llmopt.json").write_text(json.dumps(facts | {"parameters": [0, 0]}))
    assert "parameters.0 is '0'" in refused("compress", "--recipe", pristine / "r.yaml", "--model", pristine / "whole",
                                            "--output", compressed, "--resume")


def test_data_that_cannot_be_read_for_this_model(compress, model, tmp_path):
    for name in ("hub, path: no/such", "c4"):
        said = compress(model, text=f"data: {{name: {name}}}\n" + GPTQ)
        assert "the dataset cannot be loaded: " in said and "data: {name: self}" in said
    assert "path: 'x' given, nothing" in compress(model, text="data: {name: c4, path: x}\n" + GPTQ)
    for file in model.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "d.txt").write_text("the fox runs . " * 20)
    assert "has no tokenizer" in compress(model, text="data: {name: text, path: d.txt}\n" + GPTQ)
    assert "calibration text of your own" in compress(model, text="data: {name: world}\n" + GPTQ)
    assert "this is a folder" in compress(model, text="data: {name: text, path: m}\n" + GPTQ)


def test_half_precision_on_the_cpu_is_not_bad_input(monkeypatch, model, tmp_path):
    (tmp_path / "r.yaml").write_text(RTN)
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "r.yaml", "--model", model, "--set",
                "model.dtype=float16", "--output", tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
