"""Models of three kinds to operate on, each called on ids (B, T), and a way to fake a training."""

import torch
import torch.nn.functional as F
from tiny import randomise
from torch import Tensor, nn

from nanogpt_surgery import GPTConfig, SimpleGPT
from nanogpt_surgery.lora.learning import trained_updates

VOCAB = 43


class Mixer(nn.Module):
    """No transformer at all: an embedding, a Sequential, a convolution, a nested Linear."""

    def __init__(self, tied: bool):
        super().__init__()
        self.table = nn.Embedding(VOCAB, 18, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(18, 26), nn.GELU(), nn.Linear(26, 18, bias=False))
        self.smooth = nn.Conv1d(18, 18, 3, padding=1)
        self.out = nn.Linear(18, VOCAB, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)  # (B, T, 18)
        x = x + self.smooth(self.body(x).transpose(1, 2)).transpose(1, 2)
        return self.out(F.layer_norm(x, (18,)))


def simple_gpt(tied: bool = False) -> nn.Module:
    config = GPTConfig(
        VOCAB, n_embd=24, n_head=3, n_layer=2, block_size=11, n_inner=40, tie_head=tied
    )
    return randomise(SimpleGPT.from_config(config).eval())


def mixer(tied: bool = False) -> nn.Module:
    return randomise(Mixer(tied).eval(), seed=1)


def transformers_llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=19,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomise(LlamaForCausalLM(config).eval(), seed=2)


PATIENTS = {"SimpleGPT": simple_gpt, "transformers": transformers_llama, "another": mixer}
HEADS = {"SimpleGPT": "lm_head", "transformers": "lm_head", "another": "out"}
TABLES = {"SimpleGPT": "embed_tokens", "transformers": "model.embed_tokens", "another": "table"}


def some_ids(seed: int = 0, batch: int = 3, tokens: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, tokens), generator=draw)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def train_a_little(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Move every parameter that can be trained, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    for update in trained_updates(model).values():
        for parameter in update.trained():
            parameter.data += size * torch.randn(parameter.shape, generator=draw)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.std())
