"""`llmopt compress MODEL` in words: the recipe that they make, that it repeats the run, and what is refused at once."""
import pytest

from llmopt.cli.plans import one_model, plan_of
from llmopt.errors import LlmoptError
from llmopt.quant import RTN
from llmopt.recipe.one_line import one_line
from llmopt.recipe.schemes import SCHEMES, scheme_fields
from llmopt.recipe.sources import source
from llmopt.recipe.words import Words
from tests import tiny
from tests.command import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama whose widths are 96 and 192: 64 divides one of them alone, 32 both."""
    home = tmp_path_factory.mktemp("model")
    tiny.make("llama", hidden_size=96, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
              head_dim=24).save_pretrained(home)
    return str(home)


GPTQ = "quant.gptq bits 4 group_size 32"


def steps(folder, *sets, **words) -> list[str]:
    """The steps that the words make, each with what they may decide."""
    return [" ".join([step.name, *(f"{key} {value}" for key, value in step.to_dict()[step.name].items()
                                   if key in ("bits", "group_size", "ratio"))])
            for step in one_line(folder, sets, **words).steps]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_fields_of_a_quantizer(scheme):
    step = RTN(**scheme_fields(scheme.lower()))
    said = SCHEMES[scheme]
    assert (step.bits, step.group_size, step.symmetric) == (said.bits, said.group_size, said.symmetric)
    assert step.scheme in (scheme, None) and (step.scheme or scheme == f"W{step.bits}A16")


def test_words_become_steps_with_a_group_size_that_fits(folder, caplog):
    caplog.set_level("INFO", "llmopt")
    assert steps(folder, scheme="w4a16") == [GPTQ]
    assert caplog.messages == ["group_size: 32, as 128 does not divide all widths of the model (96, 192)"]
    assert steps(folder, "ratio=0.5", bits=4, method=["snapkv", "gptq"]) == [GPTQ, "kv.snapkv ratio 0.5"]
    assert steps(folder, bits=3, group_size=-1, method="quant.rtn") == ["quant.rtn bits 3 group_size -1"]
    assert steps(folder, "bits=3", method="rtn") == ["quant.rtn bits 3 group_size 32"]
    assert steps(folder, "group_size=48", bits=4) == [GPTQ.replace("32", "48")]
    assert steps(folder, "steps.0=quant.rtn", bits=3) == [GPTQ.replace("gptq", "rtn")]
    assert steps("llmopt/reference", scheme="W8A16") == ["quant.gptq bits 8 group_size 128"]


def test_weights_left_out_may_have_other_widths(folder):
    assert "group_size 40" in steps(folder, "group_size=40", "ignore=[mlp]", bits=4)[0]


def test_a_model_without_a_usual_group_size_gets_one_scale_for_a_channel(tmp_path, caplog):
    caplog.set_level("INFO", "llmopt")
    tiny.make("llama", hidden_size=48, intermediate_size=80, num_attention_heads=2, num_key_value_heads=1,
              head_dim=24).save_pretrained(tmp_path)
    assert "group_size -1" in steps(str(tmp_path), scheme="W4A16")[0]
    assert "-1 (one scale per output channel)" in caplog.text


def test_fractions_of_bits_are_allocated_by_what_works_on_any_model(folder):
    step, = one_line(folder, bits=3.5).steps
    assert (step.bits, step.allocate, step.needs_whole) == (3.5, "lim", False)


def test_other_words_are_keys_of_the_recipe(folder, tmp_path):
    made = one_line(folder, ("eval.limit=3",), method="rtn", dtype="bf16", data="world", samples=9, length=32, seed=5)
    assert (made.model.dtype, made.data.name, made.data.samples, made.data.length) == ("bfloat16", "world", 9, 32)
    assert (made.seed, made.data.seed, made.eval.limit) == (5, 5, 3)
    (tmp_path / "r.yaml").write_text("data: {name: hub, path: a/b, split: test, samples: 3, length: 9, shifts: 2}\n"
                                   "steps: [quant.rtn]")
    changed = plan_of(folder, str(tmp_path / "r.yaml"), (), False, {"data": "world", "length": 32, "dtype": "fp32"})
    assert (changed.model.id, changed.model.dtype) == (folder, "float32")
    assert (changed.data.name, changed.data.path, changed.data.split) == ("world", None, "train")
    assert (changed.data.samples, changed.data.length, changed.data.shifts) == (3, 32, 2)       # as the recipe asks


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("a.txt", "words", {"name": "text"}), ("a.jsonl", '\n{"text": "words"}', {"name": "text"}),
    ("b.jsonl", "[1, 2]\n[3]", {"name": "ids"}), ("c.jsonl", "", {"name": "text"}), ("d.jsonl", "[" * 99_999, {}),
    ("e.jsonl", '{"messages": [{"role": "user", "content": "x"}]}',
     {"name": "text", "column": "messages", "template": "chat"})])
def test_a_file_of_data_is_known_by_its_first_line(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert source(str(tmp_path / name)) == {"name": "text", "path": str(tmp_path / name)} | expected


def test_other_data_is_a_source_or_a_dataset():
    assert source("world") == {"name": "world"}
    assert source("owner/name") == {"name": "hub", "path": "owner/name"}
    for word in ("wrold", "./none", "some/file.txt"):
        with pytest.raises(LlmoptError, match="no such file"):
            source(word)


@pytest.mark.parametrize(("words", "expected"), [
    ({}, "a scheme, bits or a method is needed"),
    ({"scheme": "W4A61"}, "did you mean 'W4A16'?"),
    ({"scheme": "NF4"}, "known elsewhere, not written by llmopt. Schemes: W2A16"),
    ({"scheme": "W4A16", "bits": 4}, "not both"), ({"scheme": "FP8", "bits": 4}, "not both"),
    ({"scheme": "NVPF4"}, "did you mean 'NVFP4'?"),
    ({"scheme": "NVFP4", "group_size": 32}, "group_size: 32 given, 16, as scheme NVFP4 says (or no scheme), expected"),
    ({"bits": 1}, "bits: 1 given, a number from 2 to 8"), ({"bits": 17}, "bits: 17 given"),
    ({"bits": float("nan")}, "a finite number"), ({"bits": "4"}, "bits: '4' given, a number"),
    ({"group_size": 64}, "group_size belongs to quantization"),
    ({"group_size": 100, "bits": 4}, "does not divide all widths of the model (96, 192). Give 32, -1"),
    ({"group_size": 0, "bits": 4}, "group_size: 0 given"),
    ({"method": "snapvk"}, "did you mean 'snapkv'?"), ({"method": "kv.snpkv"}, "did you mean 'kv.snapkv'?"),
    ({"method": ["rtn", "gptq"]}, "at most one quantization step"),
    ({"method": "snapkv"}, "exactly one of ratio and budget expected; such as ratio=0.5"),
    ({"shceme": "W4A16"}, "did you mean 'scheme'?"),
    ({"method": "rtn", "data": "none.txt"}, "data none.txt: there is no such file")])
def test_words_that_cannot_be_meant(folder, words, expected):
    with pytest.raises(LlmoptError) as caught:
        one_line(folder, **words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_say_what_to_do_or_how():
    assert Words(scheme="W4A16", method="snapkv", samples=3).steps == ("scheme", "method")
    assert Words(samples=3).steps == ()


@pytest.mark.parametrize(("given", "expected"), [
    (("a", "b"), "one MODEL expected, 2 given: a, b"),
    (("m", "W4A16"), "W4A16 is a scheme, not a model: --scheme W4A16"),
    (("quickstart",), "quickstart is a packaged recipe, not a model"),
    (("r.yaml",), "a recipe goes behind --recipe"), (("m.bin",), "give the folder that it lies in"),
    (("m.safetensors",), "give the folder that it lies in"), (("x.txt",), "not a model folder but a file")])
def test_what_is_no_model(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("r.yaml", "m.bin", "m.safetensors", "x.txt"):
        (tmp_path / name).touch()
    with pytest.raises(LlmoptError) as caught:
        one_model(given)
    assert expected in str(caught.value)


def test_the_recipe_in_the_checkpoint_repeats_the_run(folder, tmp_path, monkeypatch, capfd):
    words = ("compress", folder, "--scheme", "W4A16", "--method", "rtn", "--no-eval", "--set", "clip=false")
    assert call(monkeypatch, *words, "--output", tmp_path / "a") == 0
    assert "group_size: 32" in capfd.readouterr().err
    assert call(monkeypatch, "compress", "--recipe", tmp_path / "a/recipe.yaml", "--no-eval", "--output",
                tmp_path / "b") == 0
    for name in ("model.safetensors", "config.json", "llmopt.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert call(monkeypatch, *words, "--output", tmp_path / "a", "--resume") == 0         # the very same run
    capfd.readouterr()
    assert call(monkeypatch, *words, "--bits", "3", "--output", tmp_path / "c") == 2
    assert call(monkeypatch, "compress", folder, "--output", tmp_path / "c") == 2
    assert call(monkeypatch, "compress", "--recipe", "rtn", "--scheme", "W4A16", "--output", tmp_path / "c") == 2
    both, nothing, twice = capfd.readouterr().err.splitlines()
    assert both == "error: scheme W4A16 says how many bits; give it or bits 3, not both"
    assert nothing.startswith(f"error: what is to be done with {folder}? Such as: llmopt compress {folder} --scheme")
    assert twice == "error: --recipe and --scheme both say what to do; give one of them, and change a recipe with --set"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
