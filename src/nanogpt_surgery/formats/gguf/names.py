"""llama.cpp's names for our tensors and for the fields of a config."""

from __future__ import annotations

from nanogpt_surgery.formats.huggingface.name_map import Row
from nanogpt_surgery.model.config import GPTConfig

ROPE_FACTORS = "rope_freqs.weight"

# Fields of GPTConfig and the metadata that hold them, after "<architecture>.".
COMMON_FIELDS = {
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
}
FIELDS = {
    "gpt2": COMMON_FIELDS | {"norm_eps": "attention.layer_norm_epsilon"},
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3"),
        COMMON_FIELDS
        | {
            "n_kv_head": "attention.head_count_kv",
            "norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "head_dim": "attention.key_length",
        },
    ),
}

_ATTENTION, _MLP = "layers.*.self_attn.", "layers.*.mlp."
_OUTSIDE = [Row(("embed_tokens",), "token_embd"), Row(("norm",), "output_norm")]
_BLOCK = [
    Row(("layers.*.input_layernorm",), "blk.*.attn_norm"),
    Row(("layers.*.post_attention_layernorm",), "blk.*.ffn_norm"),
    Row((f"{_ATTENTION}o_proj",), "blk.*.attn_output"),
    Row((f"{_MLP}up_proj",), "blk.*.ffn_up"),
    Row((f"{_MLP}down_proj",), "blk.*.ffn_down"),
]
_HEAD = [Row(("lm_head",), "output")]


def table(architecture: str, config: GPTConfig) -> list[Row]:
    """The rows of an architecture, for `placing.place` and for writing.

    llama.cpp rotates neighbouring numbers in a llama's heads, so q and k lie there with their pairs
    side by side; in a qwen's they lie as ours.
    """
    if architecture == "gpt2":
        fused = tuple(f"{_ATTENTION}{part}_proj" for part in "qkv")
        own = [Row(("embed_positions",), "position_embd"), Row(fused, "blk.*.attn_qkv")]
        return [*_OUTSIDE, *own, *_BLOCK, *_HEAD]
    heads, kv_heads = (config.n_head, config.n_kv_head) if architecture == "llama" else (0, 0)
    own = [
        Row((f"{_ATTENTION}q_proj",), "blk.*.attn_q", interleaved=heads),
        Row((f"{_ATTENTION}k_proj",), "blk.*.attn_k", interleaved=kv_heads),
        Row((f"{_ATTENTION}v_proj",), "blk.*.attn_v"),
        Row((f"{_ATTENTION}q_norm",), "blk.*.attn_q_norm"),
        Row((f"{_ATTENTION}k_norm",), "blk.*.attn_k_norm"),
        Row((f"{_MLP}gate_proj",), "blk.*.ffn_gate"),
    ]
    return [*_OUTSIDE, *own, *_BLOCK, *_HEAD]
