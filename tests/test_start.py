"""Start-up: what is imported when, and that every order of imports leads to the same classes."""
import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from transformers import LlamaConfig

import llmopt
from llmopt.model import from_pretrained
from tests import tiny
from tests.command import ROOT, command

SLOW = {"torch", "transformers", "pydantic", "rich", "numpy", "datasets", "lm_eval", "matplotlib", "scipy", "yaml"}
WATCHED = f"""
import sys
from llmopt_evals.start import main

try:
    main()
finally:
    print("slow:", *{SLOW} & {{*sys.modules}}, file=sys.stderr)
"""
NOT_NEEDED = {"lm_eval", "datasets", "scipy", "matplotlib"}         # by a run that scores nothing and draws nothing
QUIET = ["compress", "--recipe", "r.yaml", "--output", "out", "--no-eval", "-q"]
ALL_STAGES = """
model: {id: m}
data: {name: ids, path: ids.jsonl}
steps:
  - heads.span: {}
  - prune.magnitude: {ratio: 0.3}
  - transform.fold_norms: {}
  - quant.gptq: {group_size: 8}
  - attention.a_shape: {}
  - kv.snapkv: {ratio: 0.5}
"""
AUTO = "transformers.models.auto.modeling_auto"


def watched(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """A cold start of the command that tells which of the slow libraries it has imported."""
    _, variables = command(**environment)
    return subprocess.run([sys.executable, "-c", WATCHED, *words], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(("words", "code", "text"), [
    (["--help"], 0, "Compress Hugging Face"), (["compress", "--help"], 0, "--dry-run"), (["--version"], 0, "llmopt"),
    ([], 2, "Usage"), (["--wrong"], 2, "--wrong"), (["heads", "m", "--wrong"], 2, "--wrong"),
    (["compres"], 2, "compres")])
def test_what_needs_no_model_needs_no_library(words, code, text):
    run = watched(*words)
    assert run.returncode == code
    assert text in run.stdout + run.stderr
    assert run.stderr.splitlines()[-1] == "slow:"


@pytest.mark.parametrize("words", [["--scheme", "NF4"], ["--bits", "1"], [], ["--scheme", "W4A16", "--bits", "3"],
                                   ["--scheme", "W4A16", "--data", "none.txt"],
                                   ["--scheme", "W4A16", "--recipe", "rtn"]])
def test_words_that_cannot_be_meant_are_refused_before_torch_is_there(words):
    run = watched("compress", "nowhere", *words)
    assert run.returncode == 2
    told, slow = run.stderr.splitlines()
    assert told.startswith("error: ") and slow in ("slow:", "slow: pydantic")


@pytest.mark.parametrize(("line", "word"), [("llmopt com", "compress"), ("llmopt compress --rec", "--recipe"),
                                            ("llmopt bench sc", "scale"), ("llmopt eval x --ta", "--tasks")])
def test_shell_completion_needs_no_library(line, word):
    run = watched(_LLMOPT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(line.split()) - 1))
    assert f"plain,{word}" in run.stdout
    assert run.stderr == "slow:\n"


def test_importing_llmopt_imports_no_library():
    script = f"import sys, llmopt\nassert llmopt.__all__ and not {SLOW} & {{*sys.modules}}, sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], env=command()[1], check=True)


def test_type_checkers_and_dir_see_every_name():
    tree = ast.parse((ROOT / "llmopt/__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body for alias in node.names}
    assert seen | {"__version__"} == set(llmopt.__all__) == set(dir(llmopt))
    assert llmopt.__version__ == version("llmopt")
    assert all(getattr(llmopt, name) is not None for name in llmopt.__all__)
    with pytest.raises(AttributeError, match="'comprss'"):
        _ = llmopt.comprss


@pytest.fixture
def anew():
    """Imports transformers' table of classes as if for the first time; afterwards all is as before."""
    before, finders = sys.modules.pop(AUTO), list(sys.meta_path)
    yield lambda: importlib.import_module(AUTO)
    sys.modules[AUTO], sys.meta_path[:] = before, finders


def knows_ours(auto) -> bool:
    return auto.AutoModelForCausalLM._model_mapping[LlamaConfig].__module__ == "llmopt.model.modeling"


def test_transformers_may_be_imported_after_llmopt(anew):
    assert knows_ours(anew())


def test_transformers_may_be_imported_before_llmopt(anew):
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, from_pretrained._AfterImport)]
    auto = anew()
    assert not knows_ours(auto)
    from_pretrained.extend_transformers()
    assert knows_ours(auto)


def test_only_the_modeling_file_of_the_model_is_imported(tmp_path):
    from tests import tiny

    llmopt.save(tiny.make("llama"), tmp_path / "m")
    script = """if True:
        import sys, llmopt
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert type(model).__module__ == "llmopt.model.modeling", type(model)
        files = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
        assert sorted(files) == ["transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
    """
    subprocess.run([sys.executable, "-c", script, tmp_path / "m"], env=command()[1], check=True)


def test_compressing_without_evaluation_needs_no_library_of_the_evaluation(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "ids.jsonl").write_text(json.dumps([*range(3, 43)]))
    (tmp_path / "r.yaml").write_text(ALL_STAGES)
    script = ("import sys, transformers.utils; from llmopt_evals.start import main\n"
              "transformers.utils.is_scipy_available = lambda: False\n"      # it takes scipy along where it can
              f"try:\n    main()\nfinally:\n    print({NOT_NEEDED} & {{*sys.modules}})")
    run = subprocess.run([sys.executable, "-c", script, *QUIET], env=command()[1], cwd=tmp_path, capture_output=True,
                         text=True)
    assert (tmp_path / "out/model.safetensors").is_file(), run.stderr
    assert run.stdout.splitlines()[-1] == "set()"
