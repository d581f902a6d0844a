"""Tiny models for tests: sizes all different, every weight random, so that nothing can hide."""

import re
from typing import get_args

import torch
from torch import Tensor, nn

from nanogpt_surgery import GPTConfig, RopeScaling, SimpleGPT
from nanogpt_surgery.model.config import Bias, Mlp, Norm, Positions

AXES = {
    "positions": get_args(Positions),
    "norm": get_args(Norm),
    "mlp": get_args(Mlp),
    "bias": get_args(Bias),
}
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=13
)

_GPT2 = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 2,
    "block_size": 19,
    "n_inner": 40,
    "norm_eps": 2e-3,
}
_LLAMA = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_head": 6,
    "n_kv_head": 2,
    "head_dim": 10,
    "n_layer": 2,
    "block_size": 19,
    "n_inner": 28,
    "norm_eps": 2e-3,
    "rope_theta": 300.0,
}

FAMILY_CONFIGS = {
    "gpt2": GPTConfig.for_family("gpt2", **_GPT2),
    "gpt2-gelu-untied": GPTConfig.for_family("gpt2", **_GPT2, mlp="gelu", tie_head=False),
    "llama": GPTConfig.for_family("llama", **_LLAMA),
    "llama-scaled-tied": GPTConfig.for_family(
        "llama", **_LLAMA, rope_scaling=SCALING, tie_head=True
    ),
    "llama-attention-bias": GPTConfig.for_family("llama", **_LLAMA, bias="attention"),
    "llama-all-bias": GPTConfig.for_family("llama", **_LLAMA, bias="all"),
    "qwen2": GPTConfig.for_family("qwen2", **_LLAMA),
    "qwen2-untied": GPTConfig.for_family("qwen2", **_LLAMA, tie_head=False),
    "qwen3": GPTConfig.for_family("qwen3", **_LLAMA),
    "qwen3-bias-untied": GPTConfig.for_family("qwen3", **_LLAMA, bias="attention", tie_head=False),
}
OWN_CONFIGS = {
    "rotary-layernorm-gelu": GPTConfig(
        **_LLAMA, positions="rotary", norm="layernorm", mlp="gelu", bias="all"
    ),
    "learned-rmsnorm-swiglu": GPTConfig(
        **_LLAMA, norm="rmsnorm", mlp="swiglu", bias="qkv", qk_norm=True, tie_head=True
    ),
    "prev-tokens-relu2": GPTConfig(
        **_LLAMA, positions="rotary", norm="rmsnorm", mlp="relu2", bias="none", n_prev_tokens=3
    ),
    "learned-prev-tokens-tied": GPTConfig(**_GPT2, n_prev_tokens=1, tie_head=True),
    "llama-uneven-width": GPTConfig.for_family("llama", **(_LLAMA | {"n_embd": 20})),
}
CONFIGS = FAMILY_CONFIGS | OWN_CONFIGS


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: matrices by their input width, vectors around 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model


def tiny_model(config: GPTConfig, seed: int = 0) -> SimpleGPT:
    """A model of a config, every weight random, in eval mode."""
    model = SimpleGPT.from_config(config).eval()
    randomise(model, seed)
    return model


def train_a_little(model: nn.Module, seed: int = 5, size: float = 0.1) -> None:
    """Gives what trains of an adapter, ours or PEFT's, values as a training might: none is zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = size * torch.randn(parameter.shape, generator=draw)
            if not parameter.requires_grad:
                continue
            if re.search(r"lora_(embedding_)?[AB]\b", name):
                parameter.copy_(change)  # whatever was drawn for A before
            elif re.search(r"lora_|updates\.|modules_to_save", name):
                parameter += change


def random_ids(config: GPTConfig, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids (batch, tokens) over the whole vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, tokens), generator=draw)


def assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    """The largest error is at most 1e-5 of the logits' standard deviation."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.std()
    assert error <= 1e-5, f"error {error:.2e} of the logits' scale"


def assert_equal_in_bfloat16(ours: Tensor, exact: Tensor) -> None:
    """The error's root mean square is at most 3 % of the logits' standard deviation.

    Rounding alone gives up to 1.9 % (30 seeds, 3 families); its largest error has a long tail.
    """
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - exact.float()).square().mean().sqrt() / exact.float().std()
    assert error <= 0.03, f"error {error:.3f} of the logits' scale"
