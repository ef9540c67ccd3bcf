"""What people who know other tools try first: each guess works, or one line names the right call."""
import copy
import os
import pickle

import pytest
import torch
from datasets import Dataset
from llmopt_evals import pairs
from llmopt_evals.world import reference_path
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import llmopt
from llmopt.errors import LlmoptError
from llmopt.kv import SnapKV
from llmopt.progress import human
from llmopt.prune import Magnitude
from llmopt.quant import GPTQ, RTN
from llmopt.specs import DataSpec
from tests import tiny

REFERENCE = "llmopt/reference"
IDS = tiny.ids(4, 32)
G16 = GPTQ(group_size=16, clip=False, sweeps=0)
RECIPE = "steps:\n- quant.rtn: {group_size: 16}\nseed: 7\n"


def small():
    return tiny.make("llama")


def compress(*words, **more):
    return llmopt.compress(small(), *words, **more)


def reference():
    """(model, tokenizer): the embedded model's first block."""
    model = AutoModelForCausalLM.from_pretrained(reference_path(), num_hidden_layers=1)
    return model, AutoTokenizer.from_pretrained(reference_path())


TEXTS = ["the fox runs near the river . the fox sleeps ."] * 4

WORKS = {           # the guess -> the methods that were applied
    "one instance": (lambda: compress(RTN(group_size=16)), "quant.rtn"),
    "instances and a class": (lambda: compress([llmopt.transform.FoldNorms, RTN(group_size=16)]),
                              "transform.fold_norms quant.rtn"),
    "a class": (lambda: llmopt.compress(reference(), RTN), "quant.rtn"),
    "a method's name": (lambda: llmopt.compress(reference(), "quant.rtn"), "quant.rtn"),
    "the end of a method's name": (lambda: compress("fold_norms"), "transform.fold_norms"),
    "a list of mappings": (lambda: compress([{"quant.rtn": {"group_size": 16}}]), "quant.rtn"),
    "a mapping of steps": (lambda: compress({"quant.rtn": {"group_size": 16}, "kv.snapkv": {"ratio": 0.5}}),
                           "quant.rtn kv.snapkv"),
    "a recipe as data": (lambda: compress({"steps": [{"quant.rtn": {"group_size": 16}}]}), "quant.rtn"),
    "a recipe object": (lambda: compress(llmopt.recipe.parse(RECIPE, "mine")), "quant.rtn"),
    "a packaged recipe": (lambda: llmopt.compress(reference(), "rtn"), "quant.rtn"),
    "a scheme": (lambda: compress("W4A16", IDS), "quant.gptq"),
    "scheme=": (lambda: compress(scheme="w3a16", data=IDS), "quant.gptq"),
    "bits=": (lambda: compress(bits=3, data=IDS), "quant.gptq"),
    "a model's name": (lambda: llmopt.compress(REFERENCE, "quant.rtn"), "quant.rtn"),
    "a pair, as load gives it": (lambda: llmopt.compress(llmopt.load(REFERENCE), RTN()), "quant.rtn"),
    "ids": (lambda: compress(G16, IDS), "quant.gptq"),
    "batches=": (lambda: compress(G16, batches=IDS), "quant.gptq"),
    "lists of ids": (lambda: compress(G16, IDS.tolist()), "quant.gptq"),
    "a DataLoader of batches": (lambda: compress(G16, DataLoader([{"input_ids": row} for row in IDS], batch_size=2)),
                                "quant.gptq"),
    "a DataLoader of ids": (lambda: compress(G16, DataLoader(IDS, batch_size=2)), "quant.gptq"),
    "texts": (lambda: llmopt.compress(reference(), GPTQ(), TEXTS), "quant.gptq"),
    "texts for a model by name": (lambda: llmopt.compress(REFERENCE, GPTQ(), TEXTS), "quant.gptq"),
    "texts for a model with a folder": (lambda: llmopt.compress(reference()[0], GPTQ(), TEXTS), "quant.gptq"),
    "a Dataset of texts": (lambda: llmopt.compress(reference(), GPTQ(), Dataset.from_dict({"text": TEXTS})),
                           "quant.gptq"),
    "nothing": (lambda: compress(G16, {"name": "self", "samples": 4, "length": 16}), "quant.gptq"),
    "a BatchEncoding": (lambda: llmopt.compress(*(lambda model, words: (
        model, GPTQ(), words(TEXTS, return_tensors="pt")))(*reference())), "quant.gptq"),
}


@pytest.mark.parametrize("guess", WORKS)
def test_a_guess_works(guess):
    call, methods = WORKS[guess]
    report = call()
    assert " ".join(record["method"] for record in report.records) == methods
    assert report.model(IDS).logits.isfinite().all()


REFUSED = {         # the guess -> what the one line must say
    "a field of AWQ": (lambda: GPTQ(w_bit=4), "unknown key 'w_bit' (did you mean 'bits'?)"),
    "a field of GPTQ-for-LLaMa": (lambda: GPTQ(wbits=4), "(did you mean 'bits'?)"),
    "a field of llm-compressor": (lambda: RTN(num_bits=4), "(did you mean 'bits'?)"),
    "a field of bitsandbytes": (lambda: RTN(load_in_4bit=True), "(did you mean 'bits'?)"),
    "a field of GPTQModel": (lambda: GPTQ(desc_act=True), "(did you mean 'act_order'?)"),
    "another field of GPTQModel": (lambda: GPTQ(damp_percent=0.1), "(did you mean 'damping'?)"),
    "a field of AutoRound": (lambda: GPTQ(sym=True), "(did you mean 'symmetric'?)"),
    "a field of mlx-lm": (lambda: RTN(q_group_size=64), "(did you mean 'group_size'?)"),
    "a field of SparseGPT": (lambda: Magnitude(sparsity=0.5), "(did you mean 'ratio'?)"),
    "a field of kvpress": (lambda: SnapKV(compression_ratio=0.5), "(did you mean 'ratio'?)"),
    "a field of SnapKV's authors": (lambda: SnapKV(max_capacity_prompt=64), "(did you mean 'budget'?)"),
    "bits in quotes": (lambda: GPTQ(bits="4"), "bits: '4' given, a number expected; without quotes: 4"),
    "torch_dtype": (lambda: llmopt.load(REFERENCE, torch_dtype="auto"), "(did you mean 'dtype'?)"),
    "device_map": (lambda: llmopt.load(REFERENCE, device_map="auto"), "(did you mean 'device'?)"),
    "output_dir": (lambda: llmopt.save(None, output_dir="out"), "(did you mean 'output'?)"),
    "dataset=": (lambda: compress("W4A16", dataset=IDS), "(did you mean 'data'?)"),
    "quantization_config=": (lambda: compress(quantization_config=RTN()), "(did you mean 'steps'?)"),
    "a misspelt recipe": (lambda: compress("quikstart"), "(did you mean 'quickstart'?)"),
    "a field in a mapping": (lambda: compress({"quant.rtn": {"wbits": 4}}), "(did you mean 'bits'?)"),
    "a scheme of others": (lambda: compress("NF4"), "known elsewhere, not written by llmopt. Schemes: W2A16"),
    "no steps": (lambda: compress(), "methods such as llmopt.quant.RTN() expected"),
    "steps and a scheme": (lambda: compress(RTN(), scheme="W4A16"), "both say what to do"),
    "a model that is not there": (lambda: llmopt.compress("./no/model", RTN()), "not a model folder"),
    "a pipeline": (lambda: llmopt.compress(object(), RTN()), "llmopt.load(FOLDER) gives one"),
    "dtype of a model in memory": (lambda: compress(RTN(), dtype="bf16"), "loaded by its name"),
    "run with texts": (lambda: llmopt.compress(REFERENCE, "W4A16", TEXTS, output="out"), "from a file or a data set"),
    "eval tasks of others": (lambda: llmopt.evaluate(REFERENCE, tasks=["world_pl"]), "(did you mean 'world_ppl'?)"),
}


@pytest.mark.parametrize("guess", REFUSED)
def test_a_wrong_guess_is_told_the_right_call(guess):
    call, words = REFUSED[guess]
    with pytest.raises(LlmoptError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


FIDELITY = {        # what the two models are compared on
    "texts": TEXTS, "ids": IDS, "lists of ids": IDS.tolist(), "a Dataset": Dataset.from_dict({"text": TEXTS}),
    "a batch": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
}


@pytest.mark.parametrize("guess", FIDELITY)
def test_fidelity_is_measured_on_what_is_at_hand(guess):
    report = llmopt.compress(REFERENCE, "quant.rtn", {"name": "self"})
    found = llmopt.evaluate(report, "fidelity", data=FIDELITY[guess])          # of what it was made, it knows
    assert 0 < found["fidelity"]["kl"] < 1


def test_rows_of_its_own_that_calibration_may_have_seen_are_passed_over():
    model = small()
    assert pairs.pair_of((model, None), (model, None), "self").data.samples == DataSpec().samples
    assert pairs.pair_of((model, None), (model, None), None).data.samples == DataSpec().samples


@pytest.mark.parametrize("call", [
    lambda: llmopt.dry_run(REFERENCE, bits=4), lambda: llmopt.dry_run("W4A16", model=REFERENCE),
    *(pytest.param(call, marks=pytest.mark.full) for call in (lambda: llmopt.dry_run(REFERENCE, "W4A16"),
                                                              lambda: llmopt.dry_run(REFERENCE, "quant.gptq")))])
def test_a_dry_run_is_asked_for_like_a_run_and_prints(call):
    told = call()
    assert "quant.gptq" in str(told) and f"dense {human(told['dense_bytes'])}" in str(told)
    assert "<td>peak memory</td>" in told._repr_html_()


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_load_takes_types_in_every_spelling(dtype):
    assert llmopt.load(REFERENCE, dtype=dtype, device=torch.device("cpu"))[0].dtype == torch.bfloat16


def test_transformers_know_the_embedded_model_by_its_name():
    assert AutoConfig.from_pretrained(REFERENCE).model_type == "llama"
    words = AutoTokenizer.from_pretrained(pretrained_model_name_or_path=REFERENCE)
    ids = words("the fox runs near the river", return_tensors="pt").input_ids
    logits = [kind.from_pretrained(REFERENCE)(ids).logits for kind in (AutoModelForCausalLM, LlamaForCausalLM)]
    assert torch.equal(*logits)
    assert "generated_text" in pipeline("text-generation", model=REFERENCE)("the fox", max_new_tokens=2)[0]
    with pytest.raises(OSError, match="find them in the cached"):
        AutoTokenizer.from_pretrained("nobody/such-model", local_files_only=True)


@pytest.mark.parametrize(("name", "words"), [
    ("quantize", "did you mean 'compress'?"), ("oneshot", "did you mean 'compress'?"),
    ("from_pretrained", "did you mean 'load'?"), ("GPTQ", "it is llmopt.quant.GPTQ"),
    ("GPTQModifier", "it is llmopt.quant.GPTQ"), ("snapkv", "it is llmopt.kv.SnapKV")])
def test_a_name_of_other_tools_is_told_ours(name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(llmopt, name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report, folder) of a tiny model, quantized, its cache halved."""
    model = tiny.make("llama", torch.bfloat16)
    report = llmopt.compress(model, [RTN(group_size=16), SnapKV(ratio=0.5, window=8)])
    return report, report.save(tmp_path_factory.mktemp("made") / "out")


def test_a_report_prints_its_table(made):
    report, folder = made
    lines = str(report).splitlines()
    assert lines[0] == "quant.rtn -> kv.snapkv"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert f"{size / 1000:.2f} kB" in next(line for line in lines if line.startswith("file size"))
    assert any(line.split()[-2:] == ["16", "4.000"] for line in lines if line.startswith("bits per quantized"))
    assert any(line.startswith("cache bytes per token") for line in lines)
    assert repr(report) == str(report)
    assert report._repr_html_().startswith("<table>") and "<td>16</td><td>4.000</td>" in report._repr_html_()
    assert str(llmopt.Report()) == "nothing was done"


def test_the_size_that_is_told_before_saving_is_what_is_written(made):
    report, folder = made
    unsaved = copy.copy(report)
    unsaved.output = None
    assert unsaved.size == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_saving_twice_names_the_argument(made):
    report, folder = made
    with pytest.raises(LlmoptError, match="overwrite=True"):
        report.save(folder)
    before = (folder / "model.safetensors").read_bytes()
    report.save(folder, overwrite=True)
    report.model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_compressed_model_is_a_model_like_others(made, tmp_path):
    """generate, deepcopy, pickle, torch.save, .half(), .to()."""
    model = made[0].model
    text = model.generate(IDS[:1], max_new_tokens=4).tolist()
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                 torch.load(tmp_path / "model.pt", weights_only=False)):
        assert twin is not model
        assert twin.generate(IDS[:1], max_new_tokens=4).tolist() == text
    assert copy.deepcopy(model).to("cpu").half()(IDS).logits.dtype == torch.float16


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_an_adapter_is_trained_on_a_compressed_folder_and_comes_back(made, tmp_path):
    adapted = lora(AutoModelForCausalLM.from_pretrained(made[1])).train()
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.1)
    before = adapted(input_ids=IDS, labels=IDS).loss
    before.backward()
    optimizer.step()
    assert adapted(input_ids=IDS, labels=IDS).loss < before
    adapted.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in os.listdir(tmp_path)
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made[1]), tmp_path)
    assert torch.equal(back(IDS).logits, adapted.eval()(IDS).logits)
