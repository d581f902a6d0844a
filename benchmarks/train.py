"""Training beside its peers: time to a loss, tokens a second, peak memory; in turns, as ratios.

    uv run benchmarks/train.py TEXT --nanogpt PATH [--only loss|rate] [--steps 2000]

Time to loss: nanoGPT's README example for a CPU (4 layers, 4 heads, width 128, block 64, batch 12,
2,000 steps, its estimates of the loss included), transformers' GPT-2 by the same loop, the recipe
`fast` for about a thirtieth of nanoGPT's time, and the recipe `fast` for all of it. They take turns
in one process, so that what else the machine does falls on all. Ours is evaluated on the whole last
tenth of the text, inside the time; it has no more parameters than nanoGPT's 0.80 million.

Rate: steps at that shape and at 6 layers × 384, block 256; each contender in a process of its own,
in turns, with its peak memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import GPT2, MIDDLE, SMALL, Shape

from nanogpt_surgery import (
    CharacterTokenizer,
    FitSettings,
    GPTDataset,
    evaluate,
    split_by_position,
)
from nanogpt_surgery.training.hardware import choose_hardware, matmul_rate

TURNS = 40
SHORT = {
    "shape": Shape(1, 2, 128, 128, 6),
    "steps": 165,
    "n_inner": 256,
    "n_kv_head": 1,
    "beta1": 0.7,
}
LONG = {
    "shape": Shape(2, 2, 128, 256, 4),
    "steps": 2000,
    "n_inner": 512,
    "n_kv_head": 1,
    "momentum": 0.95,
    "learning_rate": 0.025,
    "cooldown": 0.8,
    "compile": "on",
}


def texts(path: Path, block: int) -> tuple[GPTDataset, GPTDataset, int]:
    """The first nine tenths, the last, and the number of characters there are."""
    text = path.read_text(encoding="utf-8")
    tokenizer = CharacterTokenizer(text)
    train, held = (GPTDataset(part, tokenizer, block) for part in split_by_position(text))
    return train, held, tokenizer.vocab_size


def time_to_loss(path: Path, nanogpt: Path, steps: int) -> None:
    """Print seconds and losses of whole trainings that took turns."""
    train, held, vocab_size = texts(path, SMALL.block)
    peer, theirs = contenders.nanogpt(
        nanogpt, SMALL, train.ids, held.ids, vocab_size, steps, "float32"
    )
    second, their_loop = contenders.transformers_gpt2(
        SMALL, train.ids, held.ids, vocab_size, steps, "float32"
    )
    # For each: the model, its steps, how many, and what it is measured on within the time.
    rows = {
        "nanoGPT": (peer, theirs, steps, None),
        "transformers": (second, their_loop, steps, None),
    }
    for name, plan in (("ours, fast", SHORT), ("ours, long", LONG)):
        n, shape = max(1, plan["steps"] * steps // 2000), plan["shape"]
        options = {key: value for key, value in plan.items() if key not in ("steps", "shape")}
        own_train, own_held, _ = texts(path, shape.block)
        model, loop = contenders.ours(
            shape, own_train, vocab_size, n, "auto", evaluate_every=0, **options
        )
        rows[name] = (model, loop, n, own_held)
    seconds, losses = dict.fromkeys(rows, 0.0), {}
    for turn in range(TURNS):
        for name, (model, loop, n, own) in rows.items():
            start = contenders.waited()
            for _ in islice(loop, n * (turn + 1) // TURNS - n * turn // TURNS):
                pass
            if turn == TURNS - 1 and own is not None:
                losses[name] = evaluate(model, own)
            seconds[name] += contenders.waited() - start
    for name, model in (("nanoGPT", peer), ("transformers", second)):
        losses[name] = evaluate(contenders.Logits(model), held)
    for name, (model, _, n, _) in rows.items():
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{name:12s} {n:5d} steps  {size:9,} parameters  {seconds[name]:7.1f} s  "
            f"{seconds['nanoGPT'] / seconds[name]:6.2f} × as fast  loss {losses[name]:.4f}"
        )


def child(who: str, shape: Shape, precision: str, steps: int, path: Path, nanogpt: str) -> None:
    """Print the seconds of each step, the peak memory and the utilisation, as JSON."""
    train, held, vocab_size = texts(path, shape.block)
    if shape.vocab_size:
        vocab_size = shape.vocab_size
        ids = torch.randint(vocab_size, (shape.batch * shape.block * 8,))
        train = held = GPTDataset.from_ids(ids, shape.block)
    data = train.ids, held.ids, vocab_size, steps, precision
    if who == "nanoGPT":
        model, loop = contenders.nanogpt(Path(nanogpt), shape, *data)
    elif who == "transformers":
        model, loop = contenders.transformers_gpt2(shape, *data)
    else:
        make = contenders.ours if "fast" in who else contenders.plain
        compiled = "on" if "compiled" in who else "off"
        model, loop = make(shape, train, vocab_size, steps, precision, compile=compiled)
    seconds, start = [], contenders.waited()
    for _ in loop:
        seconds.append(contenders.waited() - start)
        start = contenders.waited()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    device = next(model.parameters()).device
    dtype = getattr(torch, precision)
    if who.startswith("ours"):
        dtype = choose_hardware(FitSettings(precision=contenders.own(precision))).precision
    step = statistics.median(seconds[1:])
    share = contenders.flops(shape, vocab_size) / step / matmul_rate(device, dtype)
    kind = str(dtype).removeprefix("torch.")
    size = sum(p.numel() for p in model.parameters())
    row = {"seconds": step, "peak": peak, "utilisation": share, "parameters": size}
    print(json.dumps(row | {"precision": kind}))


def rates(options: argparse.Namespace, shape: Shape, precision: str, steps: int) -> None:
    """Print the rate and the memory of every contender at a shape."""
    who = ["ours", "ours, compiled", "ours, fast, compiled", "transformers"]
    if shape.tie_head:  # GPT-2 itself: the recipe is another model
        who.remove("ours, fast, compiled")
    who += ["nanoGPT"] if options.nanogpt else []
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    what = json.dumps(vars(shape)), precision, str(steps), str(options.text), str(options.nanogpt)
    for _ in range(options.turns):
        for name, results in measured.items():
            command = [sys.executable, __file__, "--child", name, *what]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{shape}")
    middle = {
        name: {
            key: statistics.median(r[key] for r in results)
            for key in ("seconds", "peak", "utilisation", "parameters")
        }
        for name, results in measured.items()
    }
    for name, row in middle.items():
        print(
            f"  {name:20s} {measured[name][0]['precision']:8s} "
            f"{row['seconds'] * 1000:9.1f} ms a step  "
            f"{shape.batch * shape.block / row['seconds']:9,.0f} tokens/s  "
            f"{middle[who[-1]]['seconds'] / row['seconds']:5.2f} × {who[-1]}'s  "
            f"{row['utilisation']:4.0%} of the matmul rate  peak {row['peak']:5.2f} GiB  "
            f"{row['parameters']:11,.0f} parameters",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        who, shape, precision, steps, path, nanogpt = sys.argv[2:]
        child(who, Shape(**json.loads(shape)), precision, int(steps), Path(path), nanogpt)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--only", choices=("loss", "rate"))
    parser.add_argument("--steps", type=int, default=2000, help="of nanoGPT, for the time to loss")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--batch", type=int, default=MIDDLE.batch, help="at 6 layers × 384")
    parser.add_argument("--dropout", type=float, default=0.0, help="at 6 layers × 384")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {contenders.instruction_set()}")
    if options.only != "rate":
        if not options.nanogpt:
            raise SystemExit("the time to loss is measured beside nanoGPT: --nanogpt PATH")
        with tempfile.TemporaryDirectory() as empty:  # nothing compiled before serves
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            time_to_loss(options.text, options.nanogpt, options.steps)
    if options.only != "loss":
        rates(options, SMALL, options.precision, 60)
        middle = Shape(6, 6, 384, 256, options.batch, options.dropout)
        rates(options, middle, options.precision, 4)
        if torch.cuda.is_available():
            rates(options, GPT2, "bfloat16", 20)


if __name__ == "__main__":
    main()
