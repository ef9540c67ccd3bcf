"""The reference architecture, in three dialects and one with experts, and its checkpoint folder."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .tokenizer import save_tokenizer
from .words import BOS, EOS, PAD, WORDS

ARCHS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,  # every in_features is a multiple of 128
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # about 1 / sqrt(hidden): the first plateau passes six times sooner than with 0.02
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


EXTRA = {
    "mistral": {"sliding_window": None},
    # two of eight experts a token, together as wide as the dense FFN: 2.7 million parameters, 0.95 million at work
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True,
                  "router_aux_loss_coef": 0.01},
}


def build(arch: str = "llama", seed: int = 0, **shape) -> torch.nn.Module:
    """An untrained model in float32; `shape` overrides the reference's sizes."""
    config, model = ARCHS[arch]
    torch.manual_seed(seed)
    return model(config(**{**SHAPE, **EXTRA.get(arch, {}), **shape}))


def export(model: torch.nn.Module, folder: Path, log: list[dict]) -> None:
    """Write a Hugging Face folder (bf16 weights, tokenizer, loss curve), replacing it file by file."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    clone = type(model)(type(model.config).from_dict(model.config.to_dict())).to(torch.bfloat16)
    clone.load_state_dict(weights)
    clone.save_pretrained(beside)
    save_tokenizer(beside)
    (beside / "training.json").write_text(json.dumps(log, indent=0) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in beside.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    beside.rmdir()
