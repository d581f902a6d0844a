"""Ours beside a plain float32 PyTorch loop of the same shape, in one run, in turns.

    uv run benchmarks/train.py TEXT [--steps 2000]

The shape is that of nanoGPT's CPU example: 4 layers, 4 heads, width 128, block 64, batch 12. Both
see the same number of windows of the first 90 % of the text; both are evaluated on the whole of
the last 10 %. They take turns of 50 steps, so that what else the machine does falls on both.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    SimpleGPT,
    evaluate,
    fit,
    split_by_position,
)

LAYERS, HEADS, WIDTH, BLOCK, BATCH, TURN = 4, 4, 128, 64, 12, 50


class PlainGPT(nn.Module):
    """What one writes first: PyTorch's own encoder layers with a causal mask."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for ids (B, T)."""
        length = ids.size(1)
        x = self.tokens(ids) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layers(x, mask, is_causal=True))


def plain_steps(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Random windows, cross-entropy, AdamW at a constant rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        starts = torch.randint(len(ids) - BLOCK - 1, (BATCH,))
        windows = torch.stack([ids[i : i + BLOCK + 1] for i in starts]).long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=FitSettings().max_steps)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    tokenizer = CharacterTokenizer(text)
    train, held = (GPTDataset(part, tokenizer, BLOCK) for part in split_by_position(text))

    torch.manual_seed(1337)
    ours = SimpleGPT(tokenizer.vocab_size, WIDTH, HEADS, LAYERS, BLOCK)
    plain = PlainGPT(tokenizer.vocab_size)
    loops = {
        "ours": fit(ours, train, batch_size=BATCH, max_steps=arguments.steps, device="cpu"),
        "plain float32": plain_steps(plain, train.ids),
    }
    seconds = dict.fromkeys(loops, 0.0)
    for done in range(0, arguments.steps, TURN):
        for name, loop in loops.items():
            start = time.perf_counter()
            list(islice(loop, min(TURN, arguments.steps - done)))
            seconds[name] += time.perf_counter() - start
    print(f"{arguments.steps} steps of {BATCH} × {BLOCK}, {torch.get_num_threads()} threads")
    for name, model in [("ours", ours), ("plain float32", plain)]:
        each = seconds[name] / arguments.steps * 1000
        loss = evaluate(model, held)
        print(f"{name:14s} {seconds[name]:7.1f} s  {each:6.1f} ms a step  loss {loss:.4f}")
    print(f"ours takes {seconds['ours'] / seconds['plain float32']:.2f} × the plain loop's time")


if __name__ == "__main__":
    main()
