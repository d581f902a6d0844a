"""A training that takes milliseconds, for tests of the loop."""

import hashlib

import torch
from torch import nn

from nanogpt_surgery import CharacterTokenizer, FitSettings, GPTDataset, SimpleGPT, Step, fit

TEXT = "how much wood would a woodchuck chuck if a woodchuck could chuck wood? " * 4
TOKENIZER = CharacterTokenizer(TEXT)
DATASET = GPTDataset(TEXT, TOKENIZER, block_size=9)
VALIDATION = GPTDataset(TEXT[60:150], TOKENIZER, block_size=11)
SETTINGS = FitSettings(
    max_steps=6,
    batch_size=5,
    learning_rate=1e-2,
    warmup_steps=2,
    evaluate_every=0,
    seed=7,
    device="cpu",
    precision="float32",
    compile="off",
)


def model_of(dropout: float = 0.0, seed: int = 0) -> SimpleGPT:
    torch.manual_seed(seed)
    return SimpleGPT(TOKENIZER.vocab_size, 16, 2, 2, 12, dropout=dropout)


def train(model: nn.Module, **changes: object) -> list[Step]:
    return list(fit(model, DATASET, SETTINGS, **changes))


def hashes(model: nn.Module) -> dict[str, str]:
    """The sha256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
