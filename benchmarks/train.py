"""Training beside its peers: time to a loss, tokens a second, peak memory; in turns, as ratios.

    uv run benchmarks/train.py TEXT --nanogpt PATH [--only loss|rate] [--steps 2000]

Time to loss: nanoGPT's README example for a CPU (4 layers, 4 heads, width 128, block 64, batch 12,
2,000 steps, its estimates of the loss included), the recipe `fast` for about a fifteenth of that
time, and the recipe `fast` for all of it. The three take turns in one process, so that what else
the machine does falls on all. Ours is evaluated on the whole last tenth of the text, inside the
time; no contender has more parameters than nanoGPT's 0.80 million.

Rate: steps at that shape and at 6 layers × 384, block 256; each contender in a process of its own,
in turns, with its peak memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import contenders
import torch
from contenders import GPT2, MIDDLE, SMALL, Shape

from nanogpt_surgery import CharacterTokenizer, GPTDataset, evaluate, split_by_position

TURNS = 40
SHORT = {"shape": Shape(2, 4, 128, 96, 8), "steps": 170, "n_inner": 256}
LONG = {"shape": Shape(4, 4, 128, 128, 8), "steps": 1300, "n_inner": 384}


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
    rows = {"nanoGPT": (peer, theirs, steps, held)}
    for name, plan in (("ours, fast", SHORT), ("ours, long", LONG)):
        n, shape = max(1, plan["steps"] * steps // 2000), plan["shape"]
        own_train, own_held, _ = texts(path, shape.block)
        model, loop = contenders.ours(
            shape, own_train, vocab_size, n, "auto", n_inner=plan["n_inner"]
        )
        rows[name] = (model, loop, n, own_held)
    seconds, last = dict.fromkeys(rows, 0.0), {}
    for turn in range(TURNS):
        for name, (model, loop, n, own) in rows.items():
            start = time.perf_counter()
            share = islice(loop, n * (turn + 1) // TURNS - n * turn // TURNS)
            done = [step for step in share if isinstance(step, float)]
            if turn == TURNS - 1:
                last[name] = done[-1] if name == "nanoGPT" and done else evaluate(model, own)
            seconds[name] += time.perf_counter() - start
    for name, (model, _, n, _) in rows.items():
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{name:11s} {n:5d} steps  {size:9,} parameters  {seconds[name]:7.1f} s  "
            f"{seconds['nanoGPT'] / seconds[name]:6.2f} × as fast  loss {last[name]:.4f}"
        )
    print(f"nanoGPT on the whole last tenth: {_whole(peer, held):.4f}")


def _whole(peer: torch.nn.Module, held: GPTDataset) -> float:
    """The loss of nanoGPT where ours is measured: it gives all logits only beside targets."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.peer = peer

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.peer(ids, ids)[0]

    return evaluate(Logits(), held)


def child(who: str, shape: Shape, precision: str, steps: int, path: Path, nanogpt: str) -> None:
    """Print the seconds of each step and the peak memory, as JSON."""
    train, held, vocab_size = texts(path, shape.block)
    data = train.ids, held.ids, vocab_size, steps, precision
    if who == "nanoGPT":
        _, loop = contenders.nanogpt(Path(nanogpt), shape, *data)
    elif who == "transformers":
        _, loop = contenders.transformers_gpt2(shape, *data)
    else:
        make = contenders.ours if who == "ours, fast" else contenders.plain
        _, loop = make(shape, train, vocab_size, steps, precision)
    seconds, start = [], time.perf_counter()
    for _ in loop:
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak": peak}))


def rates(options: argparse.Namespace, shape: Shape, precision: str, steps: int) -> None:
    """Print the rate and the memory of every contender at a shape."""
    who = ["ours", "ours, fast", "transformers", *(["nanoGPT"] if options.nanogpt else [])]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in who}
    what = json.dumps(vars(shape)), precision, str(steps), str(options.text), str(options.nanogpt)
    for _ in range(options.turns):
        for name, results in measured.items():
            command = [sys.executable, __file__, "--child", name, *what]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{shape}, {precision}")
    tokens = shape.batch * shape.block
    base = statistics.median(r["seconds"] for r in measured[who[-1]])
    for name, results in measured.items():
        seconds = statistics.median(result["seconds"] for result in results)
        peak = statistics.median(result["peak"] for result in results)
        print(
            f"  {name:12s} {seconds * 1000:9.1f} ms a step  {tokens / seconds:9,.0f} tokens/s  "
            f"{base / seconds:5.2f} × {who[-1]}'s  peak {peak:5.2f} GiB",
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.only != "rate":
        if not options.nanogpt:
            raise SystemExit("the time to loss is measured beside nanoGPT: --nanogpt PATH")
        time_to_loss(options.text, options.nanogpt, options.steps)
    if options.only != "loss":
        rates(options, SMALL, options.precision, 60)
        middle = Shape(6, 6, 384, 256, options.batch, options.dropout)
        rates(options, middle, options.precision, 4)
        if torch.cuda.is_available():
            rates(options, GPT2, "bfloat16", 20)


if __name__ == "__main__":
    main()
