"""Checkpoints of true shapes with random weights: `python -m llmopt_evals.synthetic --shape NAME --output DIR`.

For memory and speed alone: what they say means nothing. Every tensor is drawn from its own seed and written shard by
shard, so that making a 7B model takes the memory of one of its shards.
"""

import argparse
from hashlib import sha256
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from llmopt.checkpoint.place import prepare_output, staged
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.model import state

SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
                                rms_norm_eps=1e-5, tie_word_embeddings=True),
    "llama-7b": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                            num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-1b": LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                            num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
                            rms_norm_eps=1e-5, tie_word_embeddings=True),
    "qwen3-0.6b": Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                              num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                              max_position_embeddings=40960, tie_word_embeddings=True),
    "qwen3-4b": Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                            max_position_embeddings=40960, tie_word_embeddings=True),
    "qwen3-30b-a3b": Qwen3MoeConfig(vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_experts=128,
                                    num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=48, head_dim=128,
                                    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=40960),
}


def write(config: PreTrainedConfig, output: Path, seed: int = 0, max_shard_size: str = "1GB") -> None:
    """A sharded bf16 checkpoint of `config`'s shapes; raises LlmoptError if `output` is in use."""
    output = prepare_output(output, None, overwrite=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with staged(output) as stage:
        writer = shards.Writer(stage, max_shard_size)
        for group in shards.by_block(state.plain_state(skeleton)):
            writer.add({name: draw(name, like, seed, config.initializer_range) for name, like in group.items()})
        writer.close()
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(stage)


def draw(name: str, like: Tensor, seed: int, std: float) -> Tensor:
    """The values of one tensor, a function of its name and the seed: norms are one, all else is normal."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    digest = sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(like.shape, dtype=like.dtype).normal_(std=std, generator=generator)


def shape_of(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The config of a named shape, with `layers` blocks instead of its own number."""
    facts = SHAPES[name].to_dict()
    facts["num_hidden_layers"] = layers or facts["num_hidden_layers"]
    facts.pop("layer_types", None)                   # follows from the number of blocks
    return AutoConfig.for_model(**facts)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        write(shape_of(options.shape, options.layers), options.output, options.seed)
    except LlmoptError as error:
        parser.error(str(error))
    click.echo(f"{options.output}: {shards.written_bytes(options.output):,} bytes")


if __name__ == "__main__":
    main()
