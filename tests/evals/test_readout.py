"""Only scored tokens get logits, on every architecture; batches by tokens; a store of answers serves one model."""
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
from tests import tiny


@pytest.mark.parametrize("family", tiny.CONFIGS)
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
