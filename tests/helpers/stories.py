"""The fixture stories260K: a Llama of 260 thousand weights, in llama2.c's format, converted here.

Seven int32 (dim, hidden, layers, heads, KV heads, vocabulary, sequence), then float32 tensors, each
kind for all layers at once; the rotary pairs of q and k lie side by side.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt_surgery import GPTConfig, SimpleGPT
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.gguf.tokenizer import sentencepiece_json
from nanogpt_surgery.formats.placing import deinterleave

DATA = Path(__file__).parents[3] / "shared" / "data"


def stories():
    """The model and its tokenizer; skips where the data is missing."""
    if not (DATA / "stories260K.bin").is_file():
        pytest.skip(f"{DATA / 'stories260K.bin'} is missing")
    return stories_model(), stories_tokenizer()


def stories_model():
    raw = (DATA / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    numbers = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    sizes = {"n_embd": dim, "n_inner": hidden, "n_layer": layers, "n_head": heads}
    config = GPTConfig.for_family(
        "llama", vocab_size=vocab, block_size=context, n_kv_head=kv_heads, tie_head=True, **sizes
    )
    kv = kv_heads * config.head_dim
    state, place = {}, 0

    def take(name, *shape):
        nonlocal place
        for i in range(layers if "*" in name else 1):
            count = int(np.prod(shape))
            state[name.replace("*", str(i))] = numbers[place : place + count].view(shape)
            place += count

    take("embed_tokens.weight", vocab, dim)
    take("layers.*.input_layernorm.weight", dim)
    for name, rows in (("q_proj", dim), ("k_proj", kv), ("v_proj", kv), ("o_proj", dim)):
        take(f"layers.*.self_attn.{name}.weight", rows, dim)
    take("layers.*.post_attention_layernorm.weight", dim)
    take("layers.*.mlp.gate_proj.weight", hidden, dim)
    take("layers.*.mlp.down_proj.weight", dim, hidden)
    take("layers.*.mlp.up_proj.weight", hidden, dim)
    take("norm.weight", dim)
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = deinterleave(state[name], heads if "q_proj" in name else kv_heads)
    state["lm_head.weight"] = state["embed_tokens.weight"]
    model = SimpleGPT.from_config(config)
    model.load_state_dict(state)
    return model.eval()


def stories_tokenizer():
    raw, place = (DATA / "tok512.bin").read_bytes(), 4
    tokens, scores = [], []
    while place < len(raw):
        score, length = struct.unpack_from("<fi", raw, place)
        token = raw[place + 8 : place + 8 + length].decode()
        tokens.append({1: "<s>", 2: "</s>"}.get(len(tokens), token.replace(" ", "▁")))
        scores.append(score)
        place += 8 + length
    contents = sentencepiece_json(tokens, scores, {0: True, 1: True, 2: True}, 0)
    return PretrainedTokenizer(contents, bos_id=1, stop_ids=[2], add_bos=True)
