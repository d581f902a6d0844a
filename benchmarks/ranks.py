"""Planned ranks beside the uniform rank of the same budget, on two tasks, by validation loss.

    uv run benchmarks/ranks.py [--steps 300] [--rank 4] [--seeds 3] [--base-steps 600]

A small GPT is trained on Python's source code; the tasks are English of two kinds: Python's
reference as text, and (--text) any file. Both adapters have all-linear targets, the same alpha /
rank, and take the same batches. Ranks are planned from 8 batches of the task's training text.
"""

import argparse
import statistics
from pathlib import Path

import torch

from nanogpt_surgery import (
    BPETokenizer,
    GPTDataset,
    SimpleGPT,
    evaluate,
    fit,
    inject_lora,
    python_reference,
    python_source,
    remove_lora,
    split_by_position,
)
from nanogpt_surgery.surgery import plan_ranks

BLOCK, BATCH = 64, 12


def datasets(text: str, tokenizer: BPETokenizer) -> tuple[GPTDataset, GPTDataset]:
    """Training text and held-out text as windows."""
    train, held_out = split_by_position(text)
    return GPTDataset(train, tokenizer, block_size=BLOCK), GPTDataset(
        held_out, tokenizer, block_size=BLOCK
    )


def batches(dataset: GPTDataset, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Some batches of windows, drawn by a seed."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        rows = [dataset[int(i)] for i in torch.randint(len(dataset), (BATCH,), generator=draw)]
        ids, targets = zip(*rows, strict=True)
        made.append((torch.stack(ids), torch.stack(targets)))
    return made


def tuned_loss(
    model: SimpleGPT, data: tuple[GPTDataset, GPTDataset], steps: int, seed: int, **options: object
) -> tuple[float, int]:
    """The validation loss after a fine-tuning, and the adapter's parameters."""
    torch.manual_seed(seed)
    report = inject_lora(model, **options)
    for _ in fit(model, data[0], max_steps=steps, seed=seed, batch_size=BATCH, learning_rate=2e-3):
        pass
    loss = evaluate(model, data[1])
    remove_lora(model)
    return loss, report.summary["trainable_parameters"]


def main() -> None:
    """Trains the base, then compares on each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("steps", 300), ("rank", 4), ("seeds", 3), ("base-steps", 600)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--text", type=Path, help="a text of the second task")
    chosen = parser.parse_args()
    source, reference = python_source()[:400_000], python_reference()[:200_000]
    other = chosen.text.read_text("utf-8")[:200_000] if chosen.text else None
    tokenizer = BPETokenizer.train(source + reference, 512)
    torch.manual_seed(0)
    base = SimpleGPT(tokenizer.vocab_size, block_size=BLOCK)
    data = datasets(source, tokenizer)
    for _ in fit(base, data[0], max_steps=chosen.base_steps, batch_size=BATCH):
        pass
    print(f"base: {evaluate(base, data[1]):.4f} on Python's source, after training")
    for task, text in (("reference", reference), ("second", other)):
        if text is None:
            continue
        data = datasets(text, tokenizer)
        print(f"{task}: {evaluate(base, data[1]):.4f} before")
        uniform, planned = [], []
        for seed in range(chosen.seeds):
            loss, budget = tuned_loss(
                base, data, chosen.steps, seed, targets="all-linear", rank=chosen.rank
            )
            plan = plan_ranks(base, batches(data[0], 8, seed), budget, rank=chosen.rank)
            ranks = sorted(plan.rank_pattern.values())
            found, used = tuned_loss(base, data, chosen.steps, seed, **plan.options)
            print(
                f"  seed {seed}: uniform {loss:.4f} ({budget:,}), planned {found:.4f} ({used:,}); "
                f"{len(ranks)} layers, ranks {ranks[0]} to {ranks[-1]}"
            )
            uniform.append(loss)
            planned.append(found)
        means = statistics.mean(uniform), statistics.mean(planned)
        print(f"  mean: uniform {means[0]:.4f}, planned {means[1]:.4f}")


if __name__ == "__main__":
    main()
