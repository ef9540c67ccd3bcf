"""The hub, for real: transformers and huggingface_hub against a small server on this machine."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llmopt_evals.world import reference_path

import llmopt
from llmopt.checkpoint import save as checkpoint
from tests import hub, tiny
from tests.command import ROOT

RECIPE = "steps:\n  - quant.rtn: {bits: 4, group_size: 32}\n"
UPLOADED = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "llmopt.json",
            "llmopt.log", "model.safetensors", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"]


def run(folder: Path, calls: list, **environment: str) -> list[dict]:
    """Results of tests/call_many.py, with an empty cache and without the rest of the network."""
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "evals"))
    variables = {"PYTHONPATH": path, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
                 "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.TOKEN}
    subprocess.run([sys.executable, str(ROOT / "tests" / "call_many.py"), str(folder / "results.json")], check=True,
                   input=json.dumps(calls), text=True, timeout=1200, cwd=folder,
                   env=os.environ | variables | environment)
    return json.loads((folder / "results.json").read_text())


def sharded(folder: Path) -> dict[str, bytes]:
    """The files of a repository as they are often found: shards, and the same weights again in other formats."""
    checkpoint.save(tiny.make("llama"), folder, max_shard_size="60KB")
    return {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "consolidated.safetensors": b"twice", "pytorch_model-00001-of-00001.bin": b"twice", "model.gguf": b"twice",
        "original/params.json": b"{}", "onnx/model.safetensors": b"twice", "pytorch_model.bin.index.json": b"{}"}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One process that downloads, compresses, uploads, downloads what it uploaded, and is refused."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "r.yaml").write_text(RECIPE)
    files = {p.name: p.read_bytes() for p in reference_path().iterdir()} | {"LICENSE": b"as you like it"}
    compress, refused = (["compress", "--recipe", "r.yaml", "--no-eval", "--output", output, "--model"]
                         for output in ("out", "refused"))
    with hub.running() as server:
        server.repos["user/model"] = {"main": {"README.md": b"not this one"}, "v1": files}
        server.repos["user/gated"] = {"main": files}
        server.gated.add("user/gated")
        server.repos["user/sharded"] = {"main": sharded(folder / "dense")}
        ids = folder / "ids.jsonl"
        ids.write_text("\n".join(map(str, tiny.ids(8, 24).tolist())))
        streamed = ["compress", "--recipe", "r.yaml", "--stream", "--set", "data.name=ids", "--set", f"data.path={ids}",
                    "--model"]
        results = run(folder, [
            [*compress, "user/model", "--set", "model.revision=v1"],
            ["show", "out", "--json"],
            "out/.netrc",
            ["push", "out", "user/small", "--private"],
            ["eval", "user/small", "--tasks", "world_copy", "--limit", "2", "--json"],
            ["push", "out", "stranger/small"],
            [*refused, "user/gated"],
            [*refused, "user/missing"],
            [*refused, "user/model", "--set", "model.revision=v9"],
            {"HF_TOKEN": "hf_bad"},
            ["push", "out", "user/small"],
            [*streamed, "user/sharded", "--output", "from-hub"],
            [*streamed, "dense", "--output", "from-folder"],
        ], HF_ENDPOINT=server.url)
        yield folder, server, results


def test_a_hub_model_at_a_revision_is_compressed(session):
    _, _, (compressed, shown, *_) = session
    assert compressed["code"] == 0, compressed["err"]
    assert compressed["err"] == ""
    facts = json.loads(shown["out"])
    assert (facts["base_model"], facts["base_licence"]) == ("user/model", "apache-2.0")
    assert facts["recipe"]["model"]["revision"] == "v1"


def test_push_uploads_everything_and_nothing_hidden(session):
    folder, repos, results = session[0], session[1].repos, session[2]
    assert results[2]["code"] == 0, results[2]["err"]
    assert results[2]["out"].strip().endswith("/user/small")
    files = repos["user/small"]["main"]
    assert sorted(files) == UPLOADED
    assert files["LICENSE"] == b"as you like it"
    assert files["model.safetensors"] == (folder / "out" / "model.safetensors").read_bytes()


def test_the_uploaded_card_names_the_repository_and_the_command(session):
    card = session[1].repos["user/small"]["main"]["README.md"].decode()
    assert 'from_pretrained("user/small")' in card
    assert "llmopt compress --recipe recipe.yaml --output out" in card


def test_what_was_uploaded_can_be_evaluated_by_its_name(session):
    result = session[2][3]
    assert result["code"] == 0, result["err"]
    assert "world_copy/acc" in json.loads(result["out"])["user/small"]


@pytest.mark.parametrize(("index", "expected"), [
    (4, "stranger/small: You don't have the rights"),
    (5, "user/gated: not a folder, and not to be had from the hub: Access to model user/gated is restricted"),
    (6, "user/missing: not a folder, and not to be had from the hub: Repository not found"),
    (7, "user/model: not a folder, and not to be had from the hub: Invalid rev id: v9"),
    (8, "user/small: not to be had with this token"),
])
def test_a_refusal_is_one_line(session, index, expected):
    result = session[2][index]
    assert result["code"] == 2
    assert len(result["err"].strip().splitlines()) == 1
    assert expected in result["err"]


def test_a_sharded_hub_model_is_streamed_like_its_folder(session):
    folder, server, results = session
    assert [result["code"] for result in results[-2:]] == [0, 0], results[-2]["err"]
    weights = {p.name for p in (folder / "from-folder").iterdir() if p.suffix == ".safetensors"}
    assert len(weights) == 1
    for name in (*weights, "config.json", "generation_config.json"):
        assert (folder / "from-hub" / name).read_bytes() == (folder / "from-folder" / name).read_bytes()


def test_only_what_is_read_is_fetched(session):
    fetched = {line.split("/")[-1] for line in session[1].asked if line.startswith("GET /user/sharded/")}
    weights = {p.name for p in (session[0] / "dense").iterdir() if p.suffix == ".safetensors"}
    assert len(weights) > 3
    assert {name for name in fetched if not name.endswith((".json", ".md"))} == weights
    assert not [line for line in session[1].asked if "params" in line]


def test_without_a_network_the_answer_comes_within_seconds(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    checkpoint.save(tiny.make("llama"), tmp_path / "out")
    words = ["compress", "--recipe", "r.yaml", "--model", "user/model", "--output", "o2"]
    _, *results = run(tmp_path, [words, words, ["push", "out", "user/model"]], HF_ENDPOINT="http://127.0.0.1:9")
    for result in results:                          # the first one also waits for its imports
        assert result["code"] == 2
        assert len(result["err"].strip().splitlines()) == 1, result["err"]
        assert "user/model" in result["err"]
        assert "Connection refused" in result["err"]
        assert result["seconds"] < 10


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """One process that pulls through broken connections, shows hub models, and is refused."""
    folder = tmp_path_factory.mktemp("pull")
    model = tiny.make("llama")
    llmopt.compress(model, [llmopt.quant.RTN(bits=4, group_size=32)])
    checkpoint.save(model, folder / "out")
    tiny.make("gpt2").save_pretrained(folder / "dense")
    shutil.copytree(folder / "out", folder / "changed")
    (folder / "changed/more.safetensors").write_bytes(bytes(10))
    shutil.copytree(folder / "out", folder / "some")
    (folder / "some/PARTIAL").write_text("")
    files = {name: {p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in ("out", "dense")}
    strange = {"run.sh": b"rm", "pickled.bin": b"twice", "../up/config.json": b"{}"}
    with hub.running() as server:
        server.repos["user/small"] = {"main": files["out"] | strange, "v2": files["out"] | {"LICENSE": b"yours"}}
        server.repos["user/dense"] = {"main": files["dense"]}
        cut = files["out"]["model.safetensors"][:-9]
        server.repos["user/cut"] = {"main": files["out"] | {"model.safetensors": cut}}
        server.repos["user/empty"] = {"main": strange}
        server.repos["user/late"] = {"main": files["out"] | {"chat_template.jinja": b"{{ messages }}"}}
        server.failing["chat_template.jinja"] = 1
        server.cut["model.safetensors"] = 1000
        again = ["pull", "user/late", "again"]
        results = run(folder, [
            ["pull", "user/small", "--json"],
            ["pull", "user/small"],
            ["pull", "user/small", "--overwrite", "--revision", "v2"],
            ["show", "user/small", "--json"],
            ["show", "user/dense", "--json"],
            ["pull", "user/dense", "copies/dense"],
            ["pull", "user/dense", "copies/dense", "--overwrite"],
            ["pull", "user/cut"],
            ["pull", "user/empty"],
            ["pull", "user/missing"],
            ["push", "dense", "user/other"],
            ["push", "changed", "user/other"],
            ["push", "some", "user/other"],
            again, again,
        ], HF_ENDPOINT=server.url)
        yield folder, server.asked, results


def test_pull_goes_on_when_a_connection_breaks_and_takes_what_it_knows(exchanged):
    folder, asked, (first, *_) = exchanged
    assert first["code"] == 0, first["err"]
    assert asked.count(f"GET /user/small/resolve/{hub.commit('main')}/model.safetensors") == 2
    told = json.loads(first["out"])
    assert (told["commit"], told["bytes"]) == (hub.commit("main"), (folder / "out/model.safetensors").stat().st_size)
    assert not [line for line in asked if "run.sh" in line or "pickled" in line]
    assert not (folder / "up").exists()
    assert not [place.name for place in folder.iterdir() if place.name.startswith(".")]


def test_pull_replaces_only_what_it_may(exchanged):
    folder, _, results = exchanged
    assert [result["code"] for result in results[1:3]] == [2, 0]
    assert "give --overwrite" in results[1]["err"]
    assert (folder / "small/LICENSE").read_bytes() == b"yours"
    assert (folder / "small/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()
    assert [result["code"] for result in results[5:7]] == [0, 2]        # a dense model is pulled, and then left alone
    assert "not a checkpoint made by llmopt" in results[6]["err"]


def test_what_has_arrived_is_not_fetched_again(exchanged):
    folder, asked, (*_, failed, done) = exchanged
    assert failed["code"] == 2
    assert "out of order; what has arrived is kept in" in failed["err"]
    assert done["code"] == 0, done["err"]
    assert asked.count(f"GET /user/late/resolve/{hub.commit('main')}/model.safetensors") == 1
    assert {path.name for path in (folder / "again").iterdir()} == {
        "chat_template.jinja", *(path.name for path in (folder / "out").iterdir())}


def test_show_fetches_the_small_files_of_a_hub_model(exchanged):
    _, asked, results = exchanged
    compressed, dense = (json.loads(result["out"]) for result in results[3:5])
    assert compressed["bits"] == {"4": 21}
    assert (dense["architecture"], dense["shape"]["layers"], dense["bits"]) == ("gpt2", 3, [32])
    assert dense["parameters"] == tiny.make("gpt2").num_parameters() == dense["bytes"] / 4
    assert dense["works"]["quant.*"].startswith("Conv1D")
    before = asked[:next(i for i, line in enumerate(asked) if "user/dense" in line and "safetensors" in line)]
    assert [line for line in before if line.startswith("GET /user/dense/")]


@pytest.mark.parametrize(("index", "expected"), [
    (7, "user/cut/model.safetensors: header says"), (8, "user/empty: holds no file of a model that llmopt reads"),
    (9, "Repository not found"), (10, "dense: no llmopt.json; this is not a checkpoint written by llmopt"),
    (11, "changed: its weights are not those that llmopt wrote"), (12, "some: holds some blocks only")])
def test_what_is_no_whole_model_is_refused(exchanged, index, expected):
    folder, _, results = exchanged
    assert results[index]["code"] == 2
    assert expected in results[index]["err"]
    assert len(results[index]["err"].strip().splitlines()) == 1
    assert not (folder / "cut").exists()
