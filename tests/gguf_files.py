"""Tiny models as GGUF files, written by llama.cpp's own package: `write(file, model, words)`."""
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from torch import nn
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

NAMES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}      # llama.cpp's
EXPERTS = {"experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "experts.down_proj": ("ffn_down_exps",)}
SHAPES = {          # of the architectures that transformers reads by a list of conversions
    "lfm2": {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
             "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
             "attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "norm_eps",
             "shortconv.l_cache": "conv_L_cache"},
}


def write(file: Path, model: nn.Module, words: Any = None, kind: str = "F32", **more: Any) -> Path:
    """The model as `file`, its matrices of the type `kind`; words: its tokenizer, byte-level BPE. more: keys."""
    config = model.config
    arch = NAMES.get(config.model_type, config.model_type)
    writer = GGUFWriter(str(file), arch)
    for key, attribute in (SHAPES.get(arch) or GGUF_CONFIG_MAPPING.get(config.model_type) or
                           GGUF_CONFIG_MAPPING[arch]).items():
        value = getattr(config, attribute, None) if attribute else None
        if value is None and key == "rope.freq_base":
            value = config.rope_parameters.get("rope_theta")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    if arch == "lfm2":
        writer.add_array("lfm2.attention.head_count_kv", [config.num_key_value_heads if "full" in kind else 0
                                                          for kind in config.layer_types])
        writer.add_float32("lfm2.rope.freq_base", config.rope_parameters["rope_theta"])
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    if words is not None:
        _add_words(writer, words)
    for name, tensor in _named(model, arch).items():
        wanted = kind if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 else "F32"
        raw = quantize(np.ascontiguousarray(tensor), GGMLQuantizationType[wanted])
        writer.add_tensor(name, raw, raw_dtype=None if wanted == "F32" else GGMLQuantizationType[wanted])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _named(model: nn.Module, arch: str) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names; values as they are but for q and k of Llama, whose rows it reorders."""
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    known, config, found = get_tensor_name_map(kind, model.config.num_hidden_layers), model.config, {}
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stem, _, leaf = name.rpartition(".")
        values = tensor.float().numpy()
        stacked = next((parts for end, parts in EXPERTS.items() if name.endswith(end)), None)
        if stacked:
            layer = name.split(".")[2]
            found |= {f"blk.{layer}.{part}.weight": half for part, half in zip(stacked, np.split(
                values, len(stacked), axis=1), strict=True)}
            continue
        told = known.get_name(stem) or known.get_name(stem.partition(".")[2])
        assert told, name
        if arch == "llama" and ("attn_q" in told or "attn_k" in told):
            heads = config.num_attention_heads if "attn_q" in told else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if arch == "lfm2" and values.ndim == 3:
            values = values.squeeze(1)
        if arch == "gpt2" and leaf == "weight" and any(w in told for w in ("attn_qkv", "attn_output", "ffn_")):
            values = values.T
        found[f"{told}.{leaf}"] = values
    return found


def _add_words(writer: GGUFWriter, words: Any) -> None:
    tokens = [word for word, _ in sorted(words.get_vocab().items(), key=lambda item: item[1])]
    import json

    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for key, index in (("bos", words.bos_token_id), ("eos", words.eos_token_id), ("padding", words.pad_token_id)):
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy()
