"""Tiny random models that read images or sound beside text: `make("qwen2_vl")` is the same model every time."""
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests import tiny

ROTARY = {"rope_type": "default", "rope_theta": 1e4}
PARTS = ROTARY | {"mrope_section": [2, 3, 3]}                       # of a head's channels: time, height, width
SOME = ROTARY | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=28,
             patch_size=14)                                         # more layers than the language part has
QWEN = dict(depth=4, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=64)
DEEP = QWEN | dict(deepstack_visual_indexes=[1], num_position_embeddings=16)
TOKENS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)


def text(kind: str | None = None, **more) -> dict:
    return tiny.WIDE | ({"model_type": kind} if kind else {}) | more


KINDS = {
    "qwen2_vl": dict(**TOKENS, text_config=text(rope_parameters=PARTS),
                     vision_config=dict(depth=4, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14)),
    "qwen2_5_vl": dict(**TOKENS, text_config=text(rope_parameters=PARTS), vision_config=QWEN, tie_word_embeddings=True),
    "qwen3_vl": dict(**TOKENS, text_config=text(rope_parameters=PARTS | {"mrope_interleaved": True}),
                     vision_config=DEEP),
    "qwen3_vl_moe": dict(**TOKENS, text_config=text(rope_parameters=PARTS, **tiny.EXPERTS), vision_config=DEEP),
    "qwen3_5": dict(**TOKENS, text_config=tiny.MORE["qwen3_5_text"] | {"rope_parameters": SOME},
                    vision_config=QWEN | {"num_position_embeddings": 16}),
    "qwen3_5_moe": dict(**TOKENS, text_config=tiny.MORE["qwen3_5_moe_text"] | {"rope_parameters": SOME},
                        vision_config=QWEN | {"num_position_embeddings": 16}),
    "llama4": dict(text_config=tiny.MORE["llama4_text"], image_token_index=90, vision_config=TOWER | dict(
        intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)),
    "llava": dict(text_config=text("llama"), vision_config=TOWER | dict(model_type="clip_vision_model"),
                  image_token_index=90, tie_word_embeddings=False),
    "llava_next": dict(text_config=text("mistral"), vision_config=TOWER | dict(model_type="clip_vision_model"),
                       image_token_index=90, tie_word_embeddings=False),
    "llava_onevision": dict(text_config=text("qwen2"), vision_config=TOWER, image_token_index=90, video_token_index=91),
    "mistral3": dict(text_config=text("mistral"), vision_config=TOWER | dict(model_type="pixtral", head_dim=16),
                     image_token_index=90),
    "gemma3": dict(text_config=text(query_pre_attn_scalar=16, **tiny.SLIDING), vision_config=TOWER,
                   mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92),
    "gemma4": dict(text_config=tiny.MORE["gemma4_text"], image_token_id=90, vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=4, position_embedding_size=64)),
    "paligemma": dict(text_config=text("gemma"), vision_config=TOWER, image_token_index=90, projection_dim=64),
    "idefics3": dict(text_config=text("llama"), vision_config=TOWER, image_token_id=90, scale_factor=2),
    "smolvlm": dict(text_config=text("llama"), vision_config=TOWER, image_token_id=90, scale_factor=2),
    "internvl": dict(text_config=text("qwen2"), vision_config=TOWER, image_token_id=90),
    "qwen2_audio": dict(text_config=text("qwen2"), audio_token_index=90, audio_config=dict(
        num_mel_bins=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32,
        max_source_positions=50)),
}


def make(kind: str, **changes):
    """A model in eval mode with weights large enough that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind] | changes),
                                                     dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.12)
    return model
