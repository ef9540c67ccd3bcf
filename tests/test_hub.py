"""The hub, for real: transformers and huggingface_hub against a small server on this machine."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llmopt_evals.world import reference_path

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
                   input=json.dumps(calls), text=True, timeout=300, cwd=folder,
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
    assert [result["code"] for result in results[-2:]] == [0, 0], results[-2:]
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
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).write_bytes((reference_path() / name).read_bytes())
    words = ["compress", "--recipe", "r.yaml", "--model", "user/model", "--output", "o2"]
    _, *results = run(tmp_path, [words, words, ["push", "out", "user/model"]], HF_ENDPOINT="http://127.0.0.1:9")
    for result in results:                          # the first one also waits for its imports
        assert result["code"] == 2
        assert len(result["err"].strip().splitlines()) == 1, result["err"]
        assert "user/model" in result["err"]
        assert "Connection refused" in result["err"]
        assert result["seconds"] < 10
