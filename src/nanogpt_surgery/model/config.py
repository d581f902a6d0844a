"""The values in which GPTs differ, and the families whose checkpoints can be opened.

A family is a choice on orthogonal axes, never a branch in the code: what differs between GPT-2 and
Qwen3 is a row of `FAMILIES`. This module does not load torch, so the command line can read it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.rope_scaling import RopeScaling
from nanogpt_surgery.values import POSITIVE, SHARE, SIZE, SIZE_OR_0, Settings

Positions = Literal["learned", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "gelu_tanh", "relu2", "swiglu"]
Bias = Literal["all", "qkv", "attention", "none"]


@dataclass(frozen=True)
class GPTConfig(Settings):
    """Everything that determines a model's shape and arithmetic; the weights are the rest.

    Where `n_kv_head`, `head_dim` or `n_inner` is given as 0, it is computed from the other sizes.
    All contradictions are reported at once, as a `SurgeryError`.
    """

    vocab_size: Annotated[int, SIZE]
    """number of token ids, V"""
    n_embd: Annotated[int, SIZE] = 128
    """width of the residual stream, C"""
    n_head: Annotated[int, SIZE] = 4
    """query heads, H"""
    n_layer: Annotated[int, SIZE] = 4
    """transformer blocks"""
    block_size: Annotated[int, SIZE] = 256
    """longest context in tokens"""
    n_kv_head: Annotated[int, SIZE_OR_0] = 0
    """key and value heads, G; fewer than n_head groups the queries (0: n_head)"""
    head_dim: Annotated[int, SIZE_OR_0] = 0
    """width of a head, D (0: n_embd / n_head)"""
    n_inner: Annotated[int, SIZE_OR_0] = 0
    """width inside the feed-forward (0: 4 C, or 8/3 C rounded up to a multiple of 32 for SwiGLU)"""
    positions: Positions = "learned"
    """how order is represented: a learned table added once, or a rotation of queries and keys"""
    norm: Norm = "layernorm"
    """LayerNorm (mean and variance) or RMSNorm (root mean square alone)"""
    mlp: Mlp = "gelu"
    """feed-forward: GELU, its tanh form (GPT-2's), ReLU squared, or the gated SwiGLU (Llama's)"""
    bias: Bias = "all"
    """which layers carry a bias: all (norms too), q k v, the whole attention, or none"""
    n_prev_tokens: Annotated[int, SIZE_OR_0] = 0
    """previous tokens whose embeddings are added to each token's, with a table for each distance"""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys (Qwen3)"""
    tie_head: bool = False
    """the head shares its matrix with the token embedding"""
    norm_eps: Annotated[float, POSITIVE] = 1e-5
    """added to the variance in the norms"""
    rope_theta: Annotated[float, POSITIVE] = 10000.0
    """base of the rotary wavelengths"""
    rope_scaling: RopeScaling | None = None
    """a scaling of the rotary wavelengths: Llama 3's, or linear"""
    dropout: Annotated[float, SHARE] = 0.0
    """probability of zeroing an activation in training"""

    def __post_init__(self) -> None:
        super().__post_init__()  # checks the ranges, and raises the contradictions
        gated = -(-8 * self.n_embd // (3 * 32)) * 32  # 8/3 C, rounded up to a multiple of 32
        sizes = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.n_embd // self.n_head,
            "n_inner": self.n_inner or (gated if self.mlp == "swiglu" else 4 * self.n_embd),
        }
        for name, value in sizes.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def contradictions(self) -> list[str]:
        """Returns a sentence for each contradiction."""
        found = []
        if not self.head_dim and self.n_embd % self.n_head:
            found.append(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            found.append(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.positions == "rotary" and head_dim % 2:
            found.append(f"head_dim {head_dim} is odd; rotary positions turn pairs")
        if self.rope_scaling and self.positions != "rotary":
            found.append(f"rope_scaling needs positions 'rotary', not {self.positions!r}")
        return found

    @classmethod
    def for_family(cls, family: str, **sizes: Any) -> Self:
        """Returns a config with the family's usual axes; `sizes` are any fields of `GPTConfig`."""
        if family not in FAMILIES:
            raise SurgeryError(f"there is no family {family!r}", f"choose {' or '.join(FAMILIES)}")
        usual = {axis: values[0] for axis, values in FAMILIES[family].items()}
        return cls(**(usual | sizes))

    @property
    def n_parameters(self) -> int:
        """Number of distinct weights, a tied head counted once."""
        norm = self.n_embd * (2 if self.norm == "layernorm" and self.bias == "all" else 1)
        linears = sum(rows * (columns + bias) for rows, columns, bias in self._linears())
        block = linears + 2 * norm + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * (1 + self.n_prev_tokens + (not self.tie_head))
        tables += self.block_size if self.positions == "learned" else 0
        return self.n_layer * block + norm + tables * self.n_embd

    def _linears(self) -> list[tuple[int, int, bool]]:
        """Returns outputs, inputs and whether there is a bias, for each Linear of a block."""
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        qkv_bias, o_bias = self.bias != "none", self.bias in ("all", "attention")
        width, inner, mlp_bias = self.n_embd, self.n_inner, self.bias == "all"
        return [
            (q, width, qkv_bias),
            (kv, width, qkv_bias),
            (kv, width, qkv_bias),
            (width, q, o_bias),
            *[(inner, width, mlp_bias)] * (2 if self.mlp == "swiglu" else 1),
            (width, inner, mlp_bias),
        ]

    def flops_per_token(self, context: int | None = None) -> int:
        """Counts the floating-point operations of a forward pass, per token, in matrix products.

        Two for each weight of a matrix that multiplies, and 4 · layers · H · D · `context` for
        attention, whose square is counted whole although half is masked (PaLM, arXiv:2204.02311,
        appendix B). A training step takes three times as many. `context` defaults to `block_size`.
        """
        context = self.block_size if context is None else context
        block = sum(rows * columns for rows, columns, _ in self._linears())
        matrices = self.n_layer * block + self.vocab_size * self.n_embd
        return 2 * matrices + 4 * self.n_layer * self.n_head * self.head_dim * context


# For each family, the values that its checkpoints may have on each axis, the usual one first.
_ROTARY: dict[str, tuple[Any, ...]] = {
    "positions": ("rotary",),
    "norm": ("rmsnorm",),
    "mlp": ("swiglu",),
    "n_prev_tokens": (0,),
    "qk_norm": (False,),
    "tie_head": (True, False),
}
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
    "llama": _ROTARY | {"bias": ("none", "all", "attention"), "tie_head": (False, True)},
    "qwen2": _ROTARY | {"bias": ("qkv",)},
    "qwen3": _ROTARY | {"bias": ("none", "attention"), "qk_norm": (True,)},
}
