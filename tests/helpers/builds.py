"""Models of three kinds to operate on, each called on ids (B, T)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import randomise
from nanogpt_surgery import GPTConfig, SimpleGPT
from nanogpt_surgery.model.config import FAMILIES

VOCAB = 43


@dataclass(frozen=True)
class Build:
    """Sizes of a model, and whose axes it has; three heads in each group."""

    width: int = 24
    inner: int = 40
    groups: int = 2
    layers: int = 2
    family: str = "gpt2"


PLAIN = Build()
BUILDS = st.builds(
    Build,
    width=st.sampled_from([12, 24, 36]),
    inner=st.integers(5, 44),
    groups=st.integers(1, 2),
    layers=st.integers(1, 3),
    family=st.sampled_from(sorted(FAMILIES)),
)


class Mixer(nn.Module):
    """No transformer at all: an embedding, a Sequential, a convolution, a nested Linear."""

    def __init__(self, width: int, inner: int, layers: int, tied: bool):
        super().__init__()
        self.table = nn.Embedding(VOCAB, width, padding_idx=0)
        self.body = nn.Sequential()
        for _ in range(layers):
            self.body.extend(
                [nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width, bias=False)]
            )
        self.smooth = nn.Conv1d(width, width, 3, padding=1)
        self.out = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)  # (B, T, width)
        x = x + self.smooth(self.body(x).transpose(1, 2)).transpose(1, 2)
        return self.out(F.layer_norm(x, x.shape[-1:]))


def simple_gpt(tied: bool = False, build: Build = PLAIN) -> nn.Module:
    config = GPTConfig.for_family(
        build.family,
        vocab_size=VOCAB,
        n_embd=build.width,
        n_head=3 * build.groups,
        n_kv_head=0 if build.family == "gpt2" else build.groups,
        n_layer=build.layers,
        block_size=11,
        n_inner=build.inner,
        tie_head=tied,
    )
    return randomise(SimpleGPT.from_config(config).eval())


def mixer(tied: bool = False, build: Build = PLAIN) -> nn.Module:
    return randomise(Mixer(build.width, build.inner, build.layers, tied).eval(), seed=1)


def transformers_model(tied: bool = False, build: Build = PLAIN) -> nn.Module:
    """A Llama, or of the family; GPT-2's there has no Linear to adapt but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama" if build.family == "gpt2" else build.family,
        vocab_size=VOCAB,
        hidden_size=build.width,
        intermediate_size=build.inner,
        num_hidden_layers=build.layers,
        num_attention_heads=3 * build.groups,
        num_key_value_heads=build.groups,
        head_dim=10,
        max_position_embeddings=19,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomise(AutoModelForCausalLM.from_config(config).eval(), seed=2)


MODELS = {"SimpleGPT": simple_gpt, "transformers": transformers_model, "another": mixer}
HEADS = {"SimpleGPT": "lm_head", "transformers": "lm_head", "another": "out"}
TABLES = {"SimpleGPT": "embed_tokens", "transformers": "model.embed_tokens", "another": "table"}


def some_ids(seed: int = 0, batch: int = 3, tokens: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens), generator=draw)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.std())
