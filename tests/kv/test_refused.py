"""What methods of the cache refuse, each in one line that names it."""
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3nTextConfig

import llmopt
from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.parts import build
from tests import tiny

SHAPE = dict(vocab_size=96, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=64)
FOREIGN = {
    "level 'run time'": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "earlier layers made": Gemma3nTextConfig(
        **SHAPE, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4)}
SMALL = kv.SnapKV(budget=10, window=4)


@pytest.mark.parametrize("reason", FOREIGN)
def test_attention_of_another_kind(reason):
    model = AutoModelForCausalLM.from_config(FOREIGN[reason])
    for attempt in (lambda: runtime.attach(model, SMALL), lambda: llmopt.compress(model, SMALL)):
        with pytest.raises(LlmoptError, match=reason):
            attempt()
    assert runtime.attachment(model) is None


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_model(compiled):
    with pytest.raises(LlmoptError, match="the model is compiled"):
        runtime.attach(compiled(tiny.make("llama")), SMALL)


@pytest.mark.parametrize("name", [name for name in llmopt.names() if name.startswith("kv.") and name != "kv.quant"])
def test_a_budget_below_sinks_and_window(name):
    with pytest.raises(LlmoptError, match=rf"{name}: budget: 11 given, at least sinks \+ window = 4 \+ 8 expected"):
        build(name, {"budget": 11, "sinks": 4, "window": 8})


@pytest.mark.parametrize("scores", [[torch.rand(4)] * 2, [torch.rand(8)] * 3, [torch.rand(4), torch.rand(3)] * 2])
def test_head_scores_of_another_shape(scores):
    method = kv.SnapKV(budget=10, window=4, allocate="heads", heads="mine")
    with pytest.raises(LlmoptError, match="mine holds scores of other heads .* the model has 3 layers of 4 heads"):
        method.apply(tiny.make("llama"), Run(scores={"mine": scores}))
    with pytest.raises(LlmoptError, match="mine holds scores that are not finite"):
        method.apply(tiny.make("llama"), Run(scores={"mine": [torch.full((4,), torch.nan)] * 3}))


@pytest.mark.parametrize("method", [kv.KVzip(budget=10, sinks=0, window=4), kv.KVzip(budget=10, sinks=0, window=4,
                                                                                    allocate="global")], ids=str)
def test_a_prompt_given_as_embeddings_cannot_be_read_again(method):
    model, embeds = tiny.make("llama"), torch.zeros(1, 20, 64)
    with runtime.attached(model, method):
        for attempt in (lambda: model(inputs_embeds=embeds, use_cache=True),
                        lambda: model.generate(inputs_embeds=embeds, max_new_tokens=2)):
            with pytest.raises(LlmoptError, match="kv.kvzip looks at token ids again: give input_ids, not inputs_emb"):
                attempt()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_positions_that_the_model_does_not_have(family):
    """Learned positions end; what is padding takes none, and a cache that was refused a turn goes on."""
    model, tokens = tiny.make(family), tiny.ids(2, 260)
    with runtime.attached(model, SMALL):
        with pytest.raises(LlmoptError, match=f"257 tokens given, but this {family} has no more than 256 positions"):
            model.generate(tokens[:1, :250], max_new_tokens=10, pad_token_id=0, eos_token_id=None)
        cache = model(tokens[:, :250], use_cache=True).past_key_values
        with pytest.raises(LlmoptError, match="260 tokens given"):
            model(tokens[:, 250:], past_key_values=cache)
        assert cache.get_seq_length() == 250
        model(tokens[:, 250:256], past_key_values=cache)
        mask = torch.ones_like(tokens)
        mask[:, :6] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(tokens, attention_mask=mask, position_ids=places, use_cache=True)
