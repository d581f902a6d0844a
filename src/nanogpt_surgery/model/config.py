"""The values in which GPTs differ, and the families whose checkpoints can be opened.

A family is a choice on orthogonal axes, never a branch in the code: what differs between GPT-2 and
Qwen3 is a row of `FAMILIES`. This module does not load torch, so the command line can read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.values import (
    FACTOR,
    POSITIVE,
    SHARE,
    SIZE,
    SIZE_OR_0,
    SWITCH,
    raise_all,
    wrong,
)

Positions = Literal["learned", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "gelu_tanh", "relu2", "swiglu"]
Bias = Literal["all", "qkv", "attention", "none"]

AXES: dict[str, tuple[str, ...]] = {
    "positions": get_args(Positions),
    "norm": get_args(Norm),
    "mlp": get_args(Mlp),
    "bias": get_args(Bias),
}


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotary wavelengths: Llama 3's, or the same for all ("linear").

    `linear` makes every wavelength `factor` times longer and reads nothing else. `llama3`:
    wavelengths under `original_max_position_embeddings / high_freq_factor` tokens stay, those over
    `original_max_position_embeddings / low_freq_factor` become `factor` times longer, and those
    between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: Literal["llama3", "linear"] = "llama3"

    def __post_init__(self) -> None:
        linear = self.rope_type == "linear"
        problems = wrong(self, POSITIVE if linear else FACTOR, "factor")
        if self.rope_type not in ("llama3", "linear"):
            problems.append(f"rope_type is {self.rope_type!r}; it must be llama3 or linear")
        problems += wrong(self, POSITIVE, "low_freq_factor", "high_freq_factor")
        problems += wrong(self, SIZE, "original_max_position_embeddings")
        low, high = self.low_freq_factor, self.high_freq_factor
        if not problems and low >= high:
            problems = [f"low_freq_factor {low} must be below high_freq_factor {high}"]
        raise_all("this rope_scaling is impossible", problems)


@dataclass(frozen=True)
class GPTConfig:
    """Everything that determines a model's shape and arithmetic; the weights are the rest.

    Three sizes follow from others where they are 0, and are resolved on construction: `n_kv_head`,
    `head_dim` and `n_inner`. All contradictions are reported at once, as a `SurgeryError`.
    """

    vocab_size: int
    """number of token ids, V"""
    n_embd: int = 128
    """width of the residual stream, C"""
    n_head: int = 4
    """query heads, H"""
    n_layer: int = 4
    """transformer blocks"""
    block_size: int = 256
    """longest context in tokens"""
    n_kv_head: int = 0
    """key and value heads, G; fewer than n_head groups the queries (0: n_head)"""
    head_dim: int = 0
    """width of a head, D (0: n_embd / n_head)"""
    n_inner: int = 0
    """width inside the feed-forward (0: 4 C, or 8/3 C rounded up to a multiple of 32 for SwiGLU)"""
    positions: Positions = "learned"
    """how order is represented: a learned table added once, or a rotation of queries and keys"""
    norm: Norm = "layernorm"
    """LayerNorm (mean and variance) or RMSNorm (root mean square alone)"""
    mlp: Mlp = "gelu"
    """feed-forward: GELU, its tanh form (GPT-2's), ReLU squared, or the gated SwiGLU (Llama's)"""
    bias: Bias = "all"
    """which layers carry a bias: all (norms too), q k v, the whole attention, or none"""
    n_prev_tokens: int = 0
    """previous tokens whose embeddings are added to each token's, with a table for each distance"""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys (Qwen3)"""
    tie_head: bool = False
    """the head shares its matrix with the token embedding"""
    norm_eps: float = 1e-5
    """added to the variance in the norms"""
    rope_theta: float = 10000.0
    """base of the rotary wavelengths"""
    rope_scaling: RopeScaling | None = None
    """a scaling of the rotary wavelengths: Llama 3's, or linear"""
    dropout: float = 0.0
    """probability of zeroing an activation in training"""

    def __post_init__(self) -> None:
        problems = wrong(self, SIZE, "vocab_size", "n_embd", "n_head", "n_layer", "block_size")
        problems += wrong(self, SIZE_OR_0, "n_kv_head", "head_dim", "n_inner", "n_prev_tokens")
        sizes = {} if problems else self._derived_sizes()
        problems += self._wrong_values() + (self._contradictions(sizes) if sizes else [])
        raise_all("this model cannot be built", problems)
        for name, value in sizes.items():
            object.__setattr__(self, name, value)

    def _derived_sizes(self) -> dict[str, int]:
        gated = -(-8 * self.n_embd // (3 * 32)) * 32
        return {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.n_embd // self.n_head,
            "n_inner": self.n_inner or (gated if self.mlp == "swiglu" else 4 * self.n_embd),
        }

    def _wrong_values(self) -> list[str]:
        found = [
            f"{axis} is {getattr(self, axis)!r}; it must be one of {', '.join(values)}"
            for axis, values in AXES.items()
            if getattr(self, axis) not in values
        ]
        found += wrong(self, POSITIVE, "norm_eps", "rope_theta")
        found += wrong(self, SHARE, "dropout")
        found += wrong(self, SWITCH, "qk_norm", "tie_head")
        if self.rope_scaling and self.positions != "rotary":
            found.append(f"rope_scaling needs positions 'rotary', not {self.positions!r}")
        return found

    def _contradictions(self, sizes: dict[str, int]) -> list[str]:
        found = []
        if not self.head_dim and self.n_embd % self.n_head:
            found.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_head % sizes["n_kv_head"]:
            found.append(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.positions == "rotary" and sizes["head_dim"] % 2:
            found.append(f"head_dim {sizes['head_dim']} is odd; rotary positions turn pairs")
        return found

    @classmethod
    def for_family(cls, family: str, **sizes: Any) -> GPTConfig:
        """A config on the family's usual axes; `sizes` are any fields of `GPTConfig`."""
        if family not in FAMILIES:
            raise SurgeryError(f"there is no family {family!r}", f"choose {' or '.join(FAMILIES)}")
        usual = {axis: values[0] for axis, values in FAMILIES[family].items()}
        return cls(**(usual | sizes))

    @property
    def n_parameters(self) -> int:
        """Number of distinct weights, a tied head counted once."""
        embeddings = (1 + self.n_prev_tokens) * self.vocab_size * self.n_embd
        if self.positions == "learned":
            embeddings += self.block_size * self.n_embd
        head = 0 if self.tie_head else self.vocab_size * self.n_embd
        return embeddings + self.n_layer * self._block_parameters() + self._norm_parameters() + head

    def _norm_parameters(self) -> int:
        return self.n_embd * (2 if self.norm == "layernorm" and self.bias == "all" else 1)

    def _block_matrices(self) -> int:
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        feed_forward_matrices = 3 if self.mlp == "swiglu" else 2
        return self.n_embd * (2 * q + 2 * kv + feed_forward_matrices * self.n_inner)

    def _block_parameters(self) -> int:
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        inner_outputs = self.n_inner * (2 if self.mlp == "swiglu" else 1)
        biases = {
            "all": q + 2 * kv + self.n_embd + inner_outputs + self.n_embd,
            "qkv": q + 2 * kv,
            "attention": q + 2 * kv + self.n_embd,
            "none": 0,
        }[self.bias]
        qk_norms = 2 * self.head_dim if self.qk_norm else 0
        return self._block_matrices() + biases + 2 * self._norm_parameters() + qk_norms

    def flops_per_token(self, context: int | None = None) -> int:
        """Floating-point operations of a forward pass, per token, in matrix products alone.

        Two for each weight of a matrix that multiplies, and 4 · layers · H · D · `context` for
        attention, whose square is counted whole although half is masked (PaLM, arXiv:2204.02311,
        appendix B). A training step takes three times as many. `context` defaults to `block_size`.
        """
        context = self.block_size if context is None else context
        matrices = self.n_layer * self._block_matrices() + self.vocab_size * self.n_embd
        return 2 * matrices + 4 * self.n_layer * self.n_head * self.head_dim * context

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)


# For each family the values its checkpoints may take on each axis, the usual one first.
FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "positions": ("learned",),
        "norm": ("layernorm",),
        "mlp": ("gelu_tanh", "gelu"),
        "bias": ("all",),
        "n_prev_tokens": (0,),
        "qk_norm": (False,),
        "tie_head": (True, False),
    },
    "llama": {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "mlp": ("swiglu",),
        "bias": ("none", "all", "attention"),
        "n_prev_tokens": (0,),
        "qk_norm": (False,),
        "tie_head": (False, True),
    },
    "qwen2": {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "mlp": ("swiglu",),
        "bias": ("qkv",),
        "n_prev_tokens": (0,),
        "qk_norm": (False,),
        "tie_head": (True, False),
    },
    "qwen3": {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "mlp": ("swiglu",),
        "bias": ("none", "attention"),
        "n_prev_tokens": (0,),
        "qk_norm": (True,),
        "tie_head": (True, False),
    },
}
