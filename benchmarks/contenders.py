"""Who takes part in benchmarks/train.py: each an iterator that does one training step an item.

nanoGPT's model is loaded from the path that is given; the loop around it is its train.py's: random
windows, AdamW, clipping, a cosine, and every 250 steps an estimate of both losses on 20 batches.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery import GPTConfig, GPTDataset, SimpleGPT, fit
from nanogpt_surgery.model.initialisation import start_from_zero
from nanogpt_surgery.training.hardware import cpu_has_bfloat16
from nanogpt_surgery.training.recipes import RECIPES


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    layers: int
    heads: int
    width: int
    block: int
    batch: int
    dropout: float = 0.0
    vocab_size: int = 0
    """of random ids; 0: the text's characters"""
    tie_head: bool = False
    """of ours; the peers' are always tied"""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(4, 4, 128, 64, 12)
MIDDLE = Shape(6, 6, 384, 256, 64)
GPT2 = Shape(12, 12, 768, 1024, 8, vocab_size=50304, tie_head=True)  # padded, as nanoGPT's is


def instruction_set() -> str:
    """What the processor computes with: a figure in bfloat16 says little without it."""
    bfloat16 = "with" if cpu_has_bfloat16() else "no"
    return f"{torch.backends.cpu.get_cpu_capability()}, {bfloat16} bfloat16 arithmetic"


def ours(
    shape: Shape, train: GPTDataset, vocab_size: int, steps: int, precision: str, **options: object
) -> tuple[nn.Module, Iterator[object]]:
    """The recipe `fast`; `options` are other sizes of the model, and other settings of `fit`."""
    recipe = RECIPES["fast"]
    sizes = {size: options.pop(size) for size in ("n_inner", "n_kv_head") if size in options}
    torch.manual_seed(1)
    model = SimpleGPT(
        vocab_size,
        shape.width,
        shape.heads,
        shape.layers,
        shape.block,
        dropout=shape.dropout,
        **sizes,
        **recipe.model,
    )
    start_from_zero(model, model.config)
    settings = recipe.training | {"batch_size": shape.batch, "max_steps": steps, **options}
    return model, fit(model, train, precision=own(precision), seed=1, **settings)


def plain(
    shape: Shape, train: GPTDataset, vocab_size: int, steps: int, precision: str, **options: object
) -> tuple[nn.Module, Iterator[object]]:
    """GPT-2's anatomy and AdamW, as the peers have: `surgery train --no-muon`."""
    torch.manual_seed(1)
    sizes = shape.width, shape.heads, shape.layers, shape.block
    model = SimpleGPT(vocab_size, *sizes, dropout=shape.dropout, tie_head=shape.tie_head)
    settings = {"batch_size": shape.batch, "max_steps": steps, **options}
    return model, fit(model, train, precision=own(precision), seed=1, **settings)


def nanogpt(
    path: Path, shape: Shape, ids: Tensor, held: Tensor, vocab_size: int, steps: int, precision: str
) -> tuple[nn.Module, Iterator[object]]:
    """The GPT of nanoGPT, by the loop of its README's example for a CPU."""
    module = _load(path / "model.py")
    torch.manual_seed(1337)
    config = module.GPTConfig(
        block_size=shape.block,
        vocab_size=vocab_size,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=shape.dropout,
        bias=False,
    )
    model = on_device(module.GPT(config))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE)

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        with _autocast(precision):
            return model(x, y)[1]

    return model, _loop(model, mean_loss, optimizer, shape, ids, held, steps)


def transformers_gpt2(
    shape: Shape, ids: Tensor, held: Tensor, vocab_size: int, steps: int, precision: str
) -> tuple[nn.Module, Iterator[object]]:
    """The GPT-2 of transformers, by the same loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=shape.block,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = on_device(GPT2LMHeadModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        with _autocast(precision):
            logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return model, _loop(model, mean_loss, optimizer, shape, ids, held, steps)


def on_device(peer: nn.Module) -> nn.Module:
    """A peer where it computes; compiled on a GPU, as nanoGPT is there by default."""
    peer.to(DEVICE)
    if DEVICE == "cuda":
        peer.compile()
    return peer


def waited() -> float:
    """The clock, when all that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Logits(nn.Module):
    """The logits of a peer; nanoGPT gives all of them only beside targets."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
        if hasattr(self.peer, "generation_config"):
            return self.peer(input_ids=ids, use_cache=False).logits
        return self.peer(ids, ids)[0]


def flops(shape: Shape, vocab_size: int) -> float:
    """The matrix products of a step of GPT-2's anatomy at this shape."""
    config = GPTConfig(vocab_size, shape.width, shape.heads, shape.layers, shape.block)
    return 3.0 * config.flops_per_token() * shape.batch * shape.block


def _loop(model, mean_loss, optimizer, shape, ids, held, steps) -> Iterator[None]:
    """A step an item, every 250 steps with an estimate of the losses before it."""
    for step in range(steps):
        if step % 250 == 0 and step:
            _estimate(model, mean_loss, shape, ids, held)
        x, y = _random_batch(ids, shape)
        loss = mean_loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == steps - 1 and steps >= 250:
            _estimate(model, mean_loss, shape, ids, held)
        yield


def _estimate(model, mean_loss, shape, *texts: Tensor) -> None:
    """What nanoGPT measures on the way: the loss on 20 random batches of each text."""
    model.eval()
    with torch.no_grad():
        for text in texts:
            for _ in range(20):
                mean_loss(*_random_batch(text, shape)).item()
    model.train()


def _random_batch(ids: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - shape.block - 1, (shape.batch,))
    windows = ids[starts[:, None] + torch.arange(shape.block + 1)].long()
    parts = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if DEVICE == "cuda":
        return tuple(part.pin_memory().to(DEVICE, non_blocking=True) for part in parts)
    return parts


def _rate(step: int, steps: int, peak: float = 1e-3, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * (0.1 + 0.9 * share)


def own(precision: str) -> str:
    """Where peers compute in bfloat16, ours does so if the processor has arithmetic for it."""
    return "auto" if precision == "bfloat16" else precision


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16")


def _load(file: Path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec and spec.loader, f"{file} cannot be loaded"
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module
