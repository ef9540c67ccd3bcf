"""What people who know other tools try first: each guess works, or one line names the right call."""
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import llmopt
from llmopt.errors import LlmoptError
from llmopt.kv import SnapKV
from llmopt.prune import Magnitude
from llmopt.quant import GPTQ, RTN

REFERENCE = "llmopt/reference"

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
}


@pytest.mark.parametrize("guess", REFUSED)
def test_a_wrong_guess_is_told_the_right_call(guess):
    call, words = REFUSED[guess]
    with pytest.raises(LlmoptError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


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
