"""A step of LoRA training: ours beside transformers + peft, in turns, each in its own process.

    uv run benchmarks/lora_step.py [--shape smollm2|gpt2] [--precision …] [--targets …] [--turns 2]

Random weights in the shape of SmolLM2-135M or GPT-2, batch 4 × 256, rank 8; adapters on q and v, on
all Linears, and on the head alone. The precision is that of the stored weights. peft computes in
it; ours in what `fit` chooses for the processor: float32 where it has no bfloat16 arithmetic.
A long training of ours is compiled, so ours is here, where there is a C++ compiler. The data is two
batches, so that from the third step on the states before the head are known, as they are from the
second epoch on: three steps of ours do not count. One of peft's does not, but for a step of over 30
seconds, which needs no warming up. Then steps count until `--seconds` are over, at most 8.

Prints for each row both times of a step (medians over the turns), the ratios of tokens a second and
of peak memory, and the rate at which each side does the products it cannot do without, as a share
of the rate of a float32 matrix product measured in the same run.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time

BATCH, TOKENS, RANK, MOST_STEPS = 4, 256, 8, 8
SHAPES = {
    "smollm2": {
        "family": "llama",
        "vocab_size": 49152,
        "n_embd": 576,
        "n_head": 9,
        "n_kv_head": 3,
        "n_layer": 30,
        "n_inner": 1536,
        "block_size": 2048,
        "tie_head": True,
    },
    "gpt2": {
        "family": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "block_size": 1024,
    },
}
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear", "head": ["lm_head"]}


def ours(shape: str, targets: str, precision: str, seconds: float) -> list[float]:
    """Seconds of each step of `fit` that counts."""
    import torch

    from nanogpt_surgery import GPTConfig, GPTDataset, SimpleGPT, fit, inject_lora

    torch.manual_seed(0)
    model = SimpleGPT.from_config(GPTConfig.for_family(**SHAPES[shape]))
    model.to(getattr(torch, precision))
    inject_lora(model, TARGETS[targets], rank=RANK, tied="untie")
    ids = torch.randint(model.config.vocab_size, (2 * BATCH * TOKENS + 1,))
    dataset = GPTDataset.from_ids(ids, TOKENS, stride=TOKENS)
    compiled = "on" if shutil.which("c++") and targets != "head" else "off"
    steps = fit(model, dataset, max_steps=1000, batch_size=BATCH, device="cpu", compile=compiled)
    for _ in range(3):
        next(steps)
    return counted(lambda: next(steps), seconds)


def theirs(shape: str, targets: str, precision: str, seconds: float) -> list[float]:
    """Seconds of each step that counts of a plain loop around peft's model, with its defaults."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from nanogpt_surgery import GPTConfig
    from nanogpt_surgery.formats.huggingface.config import config_to_json

    torch.manual_seed(0)
    own = GPTConfig.for_family(**SHAPES[shape])
    contents = config_to_json(own, own.tie_head, "float32")
    config = AutoConfig.for_model(contents.pop("model_type"), **contents)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision))
    names = ["c_attn"] if (shape, targets) == ("gpt2", "q,v") else TARGETS[targets]
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(own.vocab_size, (BATCH, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    (first,) = counted(step, 0)
    return [first] if first > 30 else counted(step, seconds)


def counted(step, seconds: float) -> list[float]:
    """Times of a step, taken until so many seconds are over."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < MOST_STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def needed(shape: str, targets: str, who: str) -> float:
    """GFLOP of the matrix products a step cannot do without, attention's and the thin ones apart.

    Forwards all of them, and the same again backwards where a gradient has to go on to the input;
    the head's own LoRA needs none, and with the states before it known, the head's product alone.
    """
    from nanogpt_surgery import GPTConfig

    config = GPTConfig.for_family(**SHAPES[shape])
    whole, head = config.flops_per_token(context=0), 2 * config.vocab_size * config.n_embd
    flops = {"ours": head, "peft": whole}[who] if targets == "head" else 2 * whole
    return flops * BATCH * TOKENS / 1e9


def matmul_rate() -> float:
    """GFLOP/s of a float32 product of the feed-forward's shape, the best of 30."""
    import torch

    x, w = torch.randn(1024, 576), torch.randn(576, 1536)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        torch.mm(x, w)
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 576 * 1536 / min(times) / 1e9


def measure(who: str, *what: str) -> tuple[float, float]:
    """Median seconds of the steps that count, and peak memory in GiB, in a new process."""
    command = [sys.executable, __file__, "--child", who, *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(result["seconds"]), result["peak"] / 2**20


def row(shape: str, targets: str, precision: str, options: argparse.Namespace, rate: float) -> None:
    """Measure one row in turns, and print it."""
    rows: dict[str, list[tuple[float, float]]] = {"ours": [], "peft": []}
    for _ in range(options.turns):
        for who, results in rows.items():
            results.append(measure(who, shape, targets, precision, str(options.seconds)))
    (mine, my_peak), (other, other_peak) = (
        map(statistics.median, zip(*results, strict=True)) for results in rows.values()
    )
    shares = [
        needed(shape, targets, who) / seconds / rate
        for who, seconds in (("ours", mine), ("peft", other))
    ]
    print(
        f"| {targets} | {precision} | {mine:.2f} s | {other:.2f} s | {other / mine:.2f} | "
        f"{my_peak:.2f} GiB | {other_peak:.2f} GiB | {my_peak / other_peak:.2f} | "
        f"{shares[0]:.0%} | {shares[1]:.0%} |",
        flush=True,
    )


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--child"]:
        who, shape, targets, precision, length = sys.argv[2:]
        seconds = {"ours": ours, "peft": theirs}[who](shape, targets, precision, float(length))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), nargs="+")
    parser.add_argument("--targets", choices=TARGETS, nargs="+")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="of steps that count, about")
    options = parser.parse_args()

    import torch
    from contenders import instruction_set

    rate = matmul_rate()
    print(
        f"{options.shape}: {torch.get_num_threads()} threads, {instruction_set()}, "
        f"float32 products {rate:.0f} GFLOP/s"
    )
    print("| targets | weights | ours | peft | × tokens/s | ours | peft | × memory | ours | peft |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for precision in options.precision or ("float32", "bfloat16"):
        for targets in options.targets or TARGETS:
            row(options.shape, targets, precision, options, rate)


if __name__ == "__main__":
    main()
