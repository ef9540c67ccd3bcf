"""The architectures: where each keeps its parts in transformers, and what it refuses to lose. A table.

Supporting another one is an entry here and one in modeling.FAMILIES; of its feed-forward part alone, a name in
FEED_FORWARD, of its heads a name in HEADS.
"""
from dataclasses import dataclass, field
from typing import Any, Literal

from llmopt.errors import nearest

Form = Literal["pre", "parallel", "sandwich", "branch_post", "residual_post"]
UNITS = ("ffn", "kv_groups", "q_heads", "attention", "mlp", "blocks")      # what pruning may take away
HEADS_IN_CONFIG = "its config derives head_dim from hidden_size / num_attention_heads, so fewer heads cannot be stored"
WIDE_HEADS = "its forward reads num_attention_heads from the model-wide config"
EXPERTS = "attention parts only: the experts of a Mixture-of-Experts model are left alone"
CONV1D = "Conv1D, which compressed-tensors cannot hold: format: dense (--set format=dense) rounds it, no file shrinks"
ROUTED = "the experts that a router chooses are left alone, and the router"
ALIKE = "attention parts only: the layers of a Mixture-of-Experts model must stay alike"

NO_ENTRY = "no table tells what its layers are made of"
FFN_ALONE = "of its layers a table knows the feed-forward part alone, whose channels can leave (units: [ffn])"
HEADS_ALONE = "of its layers a table knows the heads alone, which can leave (units: [kv_groups] or [q_heads])"
BOTH_ALONE = ("of its layers a table knows channels and heads alone, which can leave (units: [ffn, kv_groups] or "
              "[ffn, q_heads])")
PARTS_KNOWN = {                               # (feed-forward part, heads)
    (False, False): NO_ENTRY, (True, False): FFN_ALONE, (False, True): HEADS_ALONE, (True, True): BOTH_ALONE}
BESIDE_OTHERS = "its config keeps shapes of other parts by layer, or of more than text"

REFUSED = {                                   # architectures that are not compressed at all, and why
    "bitnet": "its weights are ternary already, 1.58 bits each", "rwkv": "its forward rescales its own weights"}
NORMS_KEPT: dict[Form, str] = {               # forms whose norms feed no reader: why nothing can be moved out of them
    "branch_post": "its norms stand behind the writers",
    "residual_post": "its norms normalise the residual stream itself"}
UNTURNED: dict[Form, str] = {                 # forms whose residual stream cannot be rotated, and why
    "sandwich": "norms with gains stand between its writers and the residual stream",
    "branch_post": "norms with gains stand between its writers and the residual stream",
    "residual_post": NORMS_KEPT["residual_post"]}


@dataclass(frozen=True)
class Spec:
    """One architecture: the places of its parts. Module names are relative to the decoder layer."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    ffn: str | None = "mlp"
    head_dim: str = "head_dim"                    # attribute of the attention module
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")   # one name: fused
    interleaved: bool = False                     # fused rows run head by head (q, k, v of head 0, then of head 1)
    out: str = "o_proj"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_gated: bool = True                        # with one name: rows are [gate | up]
    ffn_out: str = "mlp.down_proj"
    norms: tuple[tuple[str, str], ...] = (("attn_in", "input_layernorm"), ("ffn_in", "post_attention_layernorm"))
    norm_offset: float = 0.0                      # 1.0 where the norm multiplies by (1 + weight)
    centred: bool = False                         # norms subtract the mean, though they are no nn.LayerNorm
    form: Form = "pre"
    sliding: Literal["", "all", "typed"] = ""     # layers that sliding_window holds for; typed: see layer_types
    positions: str | None = None                  # table of learned positions
    rotary: str | None = "model.rotary_emb"       # module that makes the tables of cosines and sines
    turned: str = ""                              # why keys cannot be turned back by these tables; empty: they can
    old_theta: str = "rope_theta"                 # what transformers 4 calls the base of its rotary frequencies,
    old_share: str | None = None                  # and the share of dimensions that is rotated
    old_scaling: tuple[str, ...] = ()             # keys that its rope_scaling takes and no other; none: whichever
    served: bool = False                          # servers run its layers with shapes of their own (nemotron-nas)
    unless: tuple[str, ...] = ()                  # flags of the config, or "not FLAG", with which it does not hold
    note: str = ""                                # what every plan and card of such a model says
    known: bool = True                            # False: no entry of SPECS, its linear maps are found (discovery.py);
                                                  # of qkv, out, ffn_in and ffn_out those that are empty are not known
    at_once: bool = False                         # transformers can only unpack its packed weights while it loads
    entries: int = 0                              # of the tuple that a layer returns; 0: the hidden state alone
    groups_by_type: bool = False                  # its config holds KV heads by layer_types, query heads once
    refuse: dict[str, str] = field(default_factory=dict)    # one of UNITS, per_layer_shapes or _heads, packed

    @property
    def reshapes(self) -> bool:
        """True if anything can leave layers that stay."""
        return bool(self.qkv or self.ffn_out)


_SANDWICH = (("attn_in", "input_layernorm"), ("attn_out", "post_attention_layernorm"),
             ("ffn_in", "pre_feedforward_layernorm"), ("ffn_out", "post_feedforward_layernorm"))
_BEHIND = (("attn_out", "post_attention_layernorm"), ("ffn_out", "post_feedforward_layernorm"))
_PAIRS, _SOME = "its rotary embedding turns neighbouring channels", "some of its layers have no rotary embedding"
_ALL_HEADS = dict.fromkeys(("kv_groups", "q_heads"), "its query and key norms span all heads")
_UP = dict(ffn_in=("mlp.up_proj",), ffn_gated=False)
_ONE_NORM = dict(form="parallel", norms=(("both_in", "input_layernorm"),))
_NO_HEADS = {"kv_groups": HEADS_IN_CONFIG, "q_heads": HEADS_IN_CONFIG}
_NO_EXPERTS = {"ffn": EXPERTS, "mlp": EXPERTS, "attention": ALIKE, "per_layer_shapes": ALIKE}

SPECS: dict[str, Spec] = {
    "llama": Spec(served=True),
    "mistral": Spec(served=True, sliding="all"),
    "qwen2": Spec(served=True, sliding="typed"),
    "qwen3": Spec(sliding="typed"),
    "phi3": Spec(old_share="partial_rotary_factor", old_scaling=("short_factor", "long_factor"),
                 qkv=("qkv_proj",), ffn_in=("mlp.gate_up_proj",), sliding="all", refuse={
        "per_layer_heads": WIDE_HEADS}),
    "gemma2": Spec(norms=_SANDWICH, norm_offset=1.0, form="sandwich", sliding="typed"),
    "gemma3_text": Spec(norms=_SANDWICH, norm_offset=1.0, form="sandwich", sliding="typed"),
    "olmo2": Spec(norms=_BEHIND, form="branch_post", refuse=_ALL_HEADS),
    "olmo3": Spec(norms=_BEHIND, form="branch_post", sliding="typed", refuse=_ALL_HEADS,
                  turned="its layers turn keys by tables of their own"),
    "exaone4": Spec(norms=_BEHIND, form="branch_post", sliding="typed", turned=_SOME),
    "ministral3": Spec(sliding="all", refuse={"per_layer_heads": WIDE_HEADS}),
    "gemma": Spec(norm_offset=1.0),
    "smollm3": Spec(sliding="typed", turned=_SOME),
    "olmo": Spec(centred=True, unless=("clip_qkv",)),
    "cohere": Spec(**_ONE_NORM, centred=True, turned=_PAIRS, unless=("use_qk_norm",)),
    "cohere2": Spec(**_ONE_NORM, centred=True, sliding="typed", turned=_SOME),
    "phi": Spec(**_ONE_NORM, final_norm="model.final_layernorm", out="dense", ffn_in=("mlp.fc1",), ffn_gated=False,
                ffn_out="mlp.fc2", old_share="partial_rotary_factor", unless=("qk_layernorm",)),
    "granite": Spec(),
    "ernie4_5": Spec(turned=_PAIRS),
    "hunyuan_v1_dense": Spec(turned="norms stand behind its rotary embedding"),
    "seed_oss": Spec(),
    "helium": Spec(turned=_PAIRS, refuse=dict.fromkeys(
        ("kv_groups", "q_heads"), "its attention writes from as many channels as the hidden state has")),
    "glm": Spec(ffn_in=("mlp.gate_up_proj",), turned=_PAIRS),
    "cwm": Spec(sliding="typed"),
    "glm4": Spec(ffn_in=("mlp.gate_up_proj",), form="sandwich", turned=_PAIRS, norms=(
        ("attn_in", "input_layernorm"), ("attn_out", "post_self_attn_layernorm"),
        ("ffn_in", "post_attention_layernorm"), ("ffn_out", "post_mlp_layernorm"))),
    "arcee": Spec(**_UP),
    "nemotron": Spec(**_UP, norm_offset=1.0, old_share="partial_rotary_factor"),
    "apertus": Spec(**_UP, norms=(("attn_in", "attention_layernorm"), ("ffn_in", "feedforward_layernorm"))),
    "starcoder2": Spec(ffn_in=("mlp.c_fc",), ffn_gated=False, ffn_out="mlp.c_proj", sliding="all"),
    "stablelm": Spec(old_share="partial_rotary_factor", refuse=_NO_HEADS,
                     unless=("use_parallel_residual", "qk_layernorm")),
    "gpt_neox": Spec(old_theta="rotary_emb_base", old_share="rotary_pct",
                     layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm", attention="attention",
                     head_dim="head_size", qkv=("query_key_value",), interleaved=True, out="dense",
                     ffn_in=("mlp.dense_h_to_4h",), ffn_gated=False, ffn_out="mlp.dense_4h_to_h",
                     form="parallel", rotary="gpt_neox.rotary_emb", refuse=_NO_HEADS),
    "gpt2": Spec(layers="transformer.h", final_norm="transformer.ln_f", attention="attn", qkv=("c_attn",),
                 out="c_proj", ffn_in=("mlp.c_fc",), ffn_gated=False, ffn_out="mlp.c_proj",
                 norms=(("attn_in", "ln_1"), ("ffn_in", "ln_2")), positions="transformer.wpe", rotary=None,
                 refuse=_NO_HEADS | {"packed": CONV1D}),
    "opt": Spec(layers="model.decoder.layers", final_norm="model.decoder.final_layer_norm", ffn=None,
                out="out_proj", ffn_in=("fc1",), ffn_gated=False, ffn_out="fc2",
                norms=(("attn_in", "self_attn_layer_norm"), ("ffn_in", "final_layer_norm")),
                positions="model.decoder.embed_positions", rotary=None,
                refuse=_NO_HEADS | {"mlp": "its feed-forward is not a module of its own"}),
    "gpt_bigcode": Spec(layers="transformer.h", final_norm="transformer.ln_f", attention="attn", qkv=("c_attn",),
                        out="c_proj", ffn_in=("mlp.c_fc",), ffn_gated=False, ffn_out="mlp.c_proj",
                        norms=(("attn_in", "ln_1"), ("ffn_in", "ln_2")), positions="transformer.wpe", rotary=None,
                        unless=("not multi_query",), at_once=True, refuse=_NO_HEADS),
    "mixtral": Spec(ffn=None, ffn_in=(), ffn_out="", sliding="all", note=ROUTED, refuse=_NO_EXPERTS),
    "qwen2_moe": Spec(ffn=None, ffn_in=(), ffn_out="", sliding="typed", note=ROUTED, refuse=_NO_EXPERTS),
    "qwen3_moe": Spec(ffn=None, ffn_in=(), ffn_out="", sliding="all", note=ROUTED, refuse=_NO_EXPERTS),
}


# Model types of the language part whose layers have an entry for their feed-forward part alone, a Spec's as it is by
# default: what attends in them differs from layer to layer, or they read more than text. In their config the width is
# `intermediate_size`; True: in a model of text alone layers may differ.
FEED_FORWARD = {"qwen3_5_text": True, **dict.fromkeys((
    "gemma4_text", "gemma3_text", "gemma", "llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen2_vl_text",
    "qwen2_5_vl_text", "qwen3_vl_text"), False)}

# Those whose layers with attention have one for their heads, a Spec's as it is by default; of each head q_proj may have
# D rows of its query and behind them D of a gate on what the head gives. True: their config holds KV heads by the type
# of a layer.
HEADS = {"qwen3_5_text": False, "qwen3_5_moe_text": False, "qwen3_next": False, "gemma4_text": True}


def found(kind: str, ffn: bool, alone: bool, **places: Any) -> Spec:
    """The entry of a model without one: places says where its layers are; parts of these may be known.

    kind: the model type of the language part. ffn: its layers have a feed-forward part. alone: it is the whole model.
    """
    ffn, heads = ffn and kind in FEED_FORWARD, kind in HEADS
    reason = PARTS_KNOWN[ffn, heads]
    unknown = ["attention", "mlp", *["ffn"] * (not ffn), *["kv_groups", "q_heads"] * (not heads)]
    refuse, places = dict.fromkeys(unknown, reason), places | dict(groups_by_type=HEADS.get(kind, False))
    if not heads:
        places, refuse = places | dict(qkv=(), out=""), refuse | {"per_layer_heads": reason}
    if not ffn:
        places |= dict(ffn_in=(), ffn_out="")
    if not alone or not FEED_FORWARD.get(kind, False):
        alike = BESIDE_OTHERS if ffn else ALIKE if heads else reason
        refuse = {"per_layer_shapes": alike, "per_layer_heads": alike} | refuse
    return Spec(**places, attention="", ffn=None, norms=(), known=False, refuse=refuse)


def unsupported(kind: Any) -> str:
    """What is said of an architecture that is not compressed."""
    reason = f": {REFUSED[kind]}" if kind in REFUSED else nearest(str(kind), SPECS)
    return f"architecture {kind!r} is not supported{reason}"
