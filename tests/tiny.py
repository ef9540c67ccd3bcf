"""Tiny random models of every supported family: `make("llama")` is the same model every time."""
import copy

import torch
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
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
_BASE = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_GATED = dict(**_BASE, num_key_value_heads=2, intermediate_size=96)
_WIDE = dict(**_GATED, head_dim=16)

CONFIGS = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_WIDE, sliding_window=None),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_WIDE),
    "phi3": Phi3Config(**_GATED),
    "gemma2": Gemma2Config(**_WIDE, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(**_WIDE, sliding_window=16, query_pre_attn_scalar=16),
    "olmo2": Olmo2Config(**_GATED),
    "gpt_neox": GPTNeoXConfig(**_BASE, intermediate_size=96),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256, n_inner=96,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "opt": OPTConfig(**_BASE, ffn_dim=96, word_embed_proj_dim=64),
    "mixtral": MixtralConfig(**_GATED, num_local_experts=2, num_experts_per_tok=1),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A model in eval mode with weights large enough that every part matters to the logits."""
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
    return model


def ids(rows: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
