"""Tiny random models of every supported family: `make("llama")` is the same model every time."""
import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 96
BASE = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GATED = dict(**BASE, num_key_value_heads=2, intermediate_size=96)
WIDE = dict(**GATED, head_dim=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

CONFIGS = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**WIDE, sliding_window=None),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**WIDE),
    "phi3": Phi3Config(**GATED),
    "gemma2": Gemma2Config(**WIDE, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(**WIDE, sliding_window=16, query_pre_attn_scalar=16, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"]),
    "olmo2": Olmo2Config(**GATED),
    "gpt_neox": GPTNeoXConfig(**BASE, intermediate_size=96),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256, n_inner=96,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "opt": OPTConfig(**BASE, ffn_dim=96, word_embed_proj_dim=64),
    "mixtral": MixtralConfig(**GATED, num_local_experts=2, num_experts_per_tok=1),
    "qwen2_moe": Qwen2MoeConfig(**GATED, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": Qwen3MoeConfig(**WIDE, **EXPERTS),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, norms: bool = False, **changes):
    """A model in eval mode with weights large enough that every part matters to the logits.

    norms: gains and biases are drawn too, as in a trained model; else they are 1 and 0, as transformers begins.
    """
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.12)
                elif norms:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def ids(rows: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """500 tokens that can say everything, bytes and what is frequent in the lines."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "<s>", "</s>"],
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
