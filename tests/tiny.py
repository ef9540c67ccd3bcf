"""Tiny random models of every supported family: `make("llama")` is the same model every time."""
import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
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

# models without an entry in the table, or with one in another test's rotation: by model_type, the fields of the config
OLD = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2,
           pad_token_id=0)
NAMED = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = dict(sliding_window=16, layer_types=TYPES)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)
STATES = dict(**NAMED, hidden_size=64, num_hidden_layers=3, state_size=16)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
              layer_types=["linear_attention", "full_attention", "linear_attention"])
LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
              v_head_dim=16)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
              first_k_dense_replace=1, n_group=1, topk_group=1)
MORE = {
    "ministral3": WIDE, "qwen3_5_text": WIDE | LINEAR, "phi": GATED, "gemma": WIDE,
    "gemma4_text": WIDE | dict(sliding_window=16, layer_types=["sliding_attention", *TYPES[:2]], global_head_dim=16,
                               hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCABULARY,
                               num_kv_shared_layers=0),
    "olmo": GATED, "olmo3": GATED | SLIDING, "smollm3": GATED | {"no_rope_layers": [1, 1, 0]},
    "granite": GATED | dict(embedding_multiplier=2.0, attention_multiplier=0.1, residual_multiplier=0.5,
                            logits_scaling=2.0),
    "cohere2": WIDE | SLIDING | {"logit_scale": 0.5}, "glm4": WIDE | {"partial_rotary_factor": 0.5},
    "exaone4": GATED | SLIDING, "starcoder2": GATED, "stablelm": GATED, "ernie4_5": WIDE, "hunyuan_v1_dense": WIDE,
    "seed_oss": WIDE, "nemotron": WIDE, "arcee": WIDE, "apertus": WIDE, "helium": WIDE, "nanochat": GATED,
    "gptj": OLD | {"rotary_dim": 8}, "gpt_bigcode": OLD, "codegen": OLD | {"n_ctx": 256, "rotary_dim": 8},
    "bloom": NAMED | dict(hidden_size=64, n_layer=3, n_head=4), "falcon": BASE,
    "mpt": NAMED | dict(d_model=64, n_heads=4, n_layers=3, max_seq_len=256),
    # experts
    "qwen3_next": WIDE | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": WIDE | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 32},
    "gpt_oss": WIDE | LOCAL | SLIDING, "olmoe": GATED | dict(num_experts=4, num_experts_per_tok=2),
    "phimoe": GATED | LOCAL, "granitemoe": GATED | LOCAL, "minimax_m2": WIDE | LOCAL,
    "ernie4_5_moe": GATED | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1,
                                 moe_layer_start_index=1),
    "dots1": WIDE | ROUTED, "glm4_moe": WIDE | ROUTED, "deepseek_v2": GATED | LATENT | ROUTED,
    "deepseek_v3": GATED | LATENT | ROUTED,
    "llama4_text": WIDE | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=96, moe_layers=[1],
                               attention_chunk_size=16, no_rope_layers=[1, 1, 0]),
    "flex_olmo": GATED | dict(num_experts=4, num_experts_per_tok=2),
    # linear attention, states, convolutions
    "lfm2": GATED | dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    "granitemoehybrid": GATED | MAMBA | dict(shared_intermediate_size=96, num_local_experts=0,
                                             layer_types=["mamba", "attention", "mamba"]),
    "bamba": GATED | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": WIDE | MAMBA | dict(mamba_d_ssm=128, ssm_in_multiplier=1.5),
    "nemotron_h": WIDE | dict(mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16,
                              layers_block_type=["mamba", "attention", "mlp"]),
    "olmo_hybrid": GATED | LINEAR,
    # beyond the list of issue 16
    "cohere": GATED, "cwm": WIDE, "diffllama": GATED, "glm": WIDE | {"partial_rotary_factor": 0.5},
    "mamba": STATES | {"time_step_rank": 8}, "falcon_mamba": STATES | {"time_step_rank": 8},
    "mamba2": STATES | dict(num_heads=8, head_dim=16, n_groups=1, chunk_size=16),
    "gemma3n_text": WIDE | SLIDING | dict(vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16,
                                          num_kv_shared_layers=0, laurel_rank=16,
                                          activation_sparsity_pattern=[0.0] * 3),
    "gpt_neo": NAMED | dict(hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=256, window_size=16,
                            attention_types=[[["global", "local"], 1]]),
    "minimax": WIDE | LOCAL | {"layer_types": LINEAR["layer_types"]},
    "jamba": GATED | dict(num_experts=4, num_experts_per_tok=2, mamba_d_state=16, mamba_dt_rank=8, attn_layer_period=3,
                          attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "recurrent_gemma": WIDE | dict(lru_width=64, attention_window_size=16),
    "xglm": NAMED | dict(d_model=64, num_layers=3, attention_heads=4, ffn_dim=96, max_position_embeddings=256),
    "biogpt": BASE | {"intermediate_size": 96}, "persimmon": BASE | {"intermediate_size": 96},
    "modernbert-decoder": BASE | {"intermediate_size": 96},
    "ctrl": NAMED | dict(n_embd=64, n_layer=3, n_head=4, n_positions=256, dff=96), "vaultgemma": WIDE | SLIDING,
    "ministral": WIDE | SLIDING, "doge": GATED, "jais2": WIDE,
    "granitemoeshared": GATED | LOCAL | {"shared_intermediate_size": 32},
    "lfm2_moe": GATED | dict(layer_types=["conv", "full_attention", "conv"], num_experts=4, num_experts_per_tok=2,
                             moe_intermediate_size=32, num_dense_layers=1),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, norms: bool = False, **changes):
    """A model in eval mode with weights large enough that every part matters to the logits.

    norms: gains and biases are drawn too, as in a trained model; else they are 1 and 0, as transformers begins.
    """
    config = copy.deepcopy(CONFIGS[family]) if family in CONFIGS else AutoConfig.for_model(family, **MORE[family])
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
