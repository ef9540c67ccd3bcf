"""Only scored tokens get logits, on every architecture; batches by tokens; a store of answers serves one model."""
import json
import subprocess
import sys

import pytest
import torch
from llmopt_evals import batching, readout
from llmopt_evals.batching import batches
from llmopt_evals.lm import LlmoptLM
from llmopt_evals.readout import Readout
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from torch.nn.functional import log_softmax

import llmopt
from llmopt.model.computing import choose
from tests import tiny


@pytest.mark.parametrize("family", [*tiny.CONFIGS, "falcon_h1"])        # whose head asks its decoder for a number
@torch.no_grad()
def test_chosen_tokens_have_the_log_probabilities_of_a_whole_forward(family, monkeypatch):
    monkeypatch.setattr(readout, "CHUNK", 5 * 96 * 12)                      # five positions at a time
    model, ids = tiny.make(family), tiny.ids(2, 24)
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    reader = Readout(model)
    states, _ = reader.states(ids, use_cache=False)
    logp, hit = reader.read(states[0, 3:15], ids[0, 4:16])
    handle.remove()
    table = log_softmax(model(ids).logits[0, 3:15], -1)
    assert torch.allclose(logp, table.gather(1, ids[0, 4:16, None])[:, 0], atol=1e-5)
    assert hit.tolist() == (table.argmax(-1) == ids[0, 4:16]).tolist()
    assert seen == [1, 5, 5, 2]


def test_batches_are_made_by_their_tokens():
    assert batches([10, 3, 9, 2, 2, 2], rows=3, tokens=20) == [[0, 2], [1, 3, 4], [5]]
    assert batches([50, 40], rows=16, tokens=20) == [[0], [1]]              # each alone, and not left out


def test_what_does_not_fit_is_refused_and_what_hardly_fits_comes_in_smaller_batches(monkeypatch):
    model = tiny.make("llama")
    each = batching.token_bytes(model)
    monkeypatch.setattr(batching, "available", lambda: 2 * readout.CHUNK + 1000 * each)
    assert batching.batch_tokens(model, 100) == 500
    with pytest.raises(llmopt.LlmoptError, match=r"a request of 1,001 tokens takes .* GB to score"):
        batching.batch_tokens(model, 1001)


GAUGED = """
import json, torch
from llmopt.scale.gauge import Gauge, whole_pages
whole_pages()
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from llmopt_evals.batching import cache_bytes, token_bytes
from llmopt_evals.readout import Readout
model = AutoModelForCausalLM.from_config({config}).eval()
with torch.no_grad(), Gauge() as gauge:
    Readout(model).states(torch.zeros(8, 1024, dtype=torch.long), use_cache={cache})
    print(json.dumps([gauge.look().private, 8192 * (token_bytes(model) + {cache} * cache_bytes(model))]))
"""


@pytest.mark.full          # it measures a process
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("config", [
    "LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8,"
    " num_key_value_heads=4)", "GPT2Config(vocab_size=1000, n_embd=512, n_layer=2, n_head=8, n_positions=4096)"])
def test_scoring_takes_the_memory_that_was_predicted(config, cache):
    code = GAUGED.format(config=config, cache=cache)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured, predicted = json.loads(run.stdout)
    assert predicted == pytest.approx(measured, rel=0.25)


def test_a_head_that_is_converted_counts_once_and_tables_of_positions_do_not():
    few, many = (tiny.make("gpt2", n_positions=count) for count in (64, 4096))
    assert batching.token_bytes(few) == batching.token_bytes(many)
    model = tiny.make("llama").bfloat16()
    assert batching.head_bytes(model) == 0
    choose(model, "float32", "cpu")
    assert batching.head_bytes(model) == 4 * model.lm_head.weight.numel()


def test_a_store_of_answers_serves_the_model_that_gave_them(tmp_path):
    request = [Instance(request_type="loglikelihood", doc={}, arguments=("the fox", " runs"), idx=0)]
    model, tokenizer = llmopt.load("llmopt/reference", dtype=torch.float32)
    first = CachingLM(LlmoptLM(pretrained=model, tokenizer=tokenizer), str(tmp_path / "a.db"))
    answer = first.loglikelihood(request)
    again = CachingLM(LlmoptLM(pretrained=model, tokenizer=tokenizer), str(tmp_path / "a.db"))
    assert again.loglikelihood(request) == answer
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(llmopt.LlmoptError, match="answers of another model"):
        CachingLM(LlmoptLM(pretrained=model, tokenizer=tokenizer), str(tmp_path / "a.db"))
