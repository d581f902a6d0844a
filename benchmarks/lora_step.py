"""A step of LoRA training: ours beside transformers + peft, in turns, each in its own process.

    uv run benchmarks/lora_step.py [--shape smollm2|gpt2] [--precision …] [--compile on|off]

Random weights in the shape of SmolLM2-135M or GPT-2, batch 4 × 256, rank 8; adapters on q and v, on
all Linears, and on the head alone. A training of more than some forty steps is compiled by default,
so ours is here; the first steps do not count. Prints the median seconds of the later steps, tokens
a second as a ratio, and peak memory. The data is two batches, so that from the third step on the
states before the head are known, as they are from the second epoch on.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

BATCH, TOKENS, RANK, STEPS = 4, 256, 8, 8
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


def ours(shape: str, targets: str, precision: str, compiled: str) -> list[float]:
    """Seconds of each step of `fit`."""
    import torch

    from nanogpt_surgery import GPTConfig, GPTDataset, SimpleGPT, fit, inject_lora

    torch.manual_seed(0)
    model = SimpleGPT.from_config(GPTConfig.for_family(**SHAPES[shape]))
    model.to(getattr(torch, precision))
    inject_lora(model, TARGETS[targets], rank=RANK, tied="untie")
    ids = torch.randint(model.config.vocab_size, (2 * BATCH * TOKENS + 1,))
    dataset = GPTDataset.from_ids(ids, TOKENS, stride=TOKENS)
    options = {"batch_size": BATCH, "precision": precision, "device": "cpu", "compile": compiled}
    steps = fit(model, dataset, max_steps=STEPS, **options)
    return [step.seconds for step in steps]


def theirs(shape: str, targets: str, precision: str, _: str) -> list[float]:
    """Seconds of each step of a plain loop around peft's model, with its defaults."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from nanogpt_surgery import GPTConfig
    from nanogpt_surgery.formats.huggingface import config_to_json

    torch.manual_seed(0)
    own = GPTConfig.for_family(**SHAPES[shape])
    contents = config_to_json(own, own.tie_head, "float32")
    config = AutoConfig.for_model(contents.pop("model_type"), **contents)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision))
    names = ["c_attn"] if (shape, targets) == ("gpt2", "q,v") else TARGETS[targets]
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches = torch.randint(own.vocab_size, (2, BATCH, TOKENS))
    seconds = []
    for step in range(STEPS):
        start, ids = time.perf_counter(), batches[step % 2]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(who: str, *what: str) -> tuple[float, float]:
    """Median seconds of the later steps, and peak memory in GiB, in a new process."""
    command = [sys.executable, __file__, "--child", who, *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(result["seconds"][STEPS // 2 :]), result["peak"] / 2**20


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--child"]:
        who, *what = sys.argv[2:]
        seconds = {"ours": ours, "peft": theirs}[who](*what)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="of ours")
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.shape}, {options.precision}: s a step and peak GiB, ours and peft")
    for targets in TARGETS:
        rows: dict[str, list[tuple[float, float]]] = {"ours": [], "peft": []}
        for _ in range(options.turns):
            for who, results in rows.items():
                what = options.shape, targets, options.precision, options.compile
                results.append(measure(who, *what))
        (mine, my_peak), (other, other_peak) = (
            map(statistics.median, zip(*results, strict=True)) for results in rows.values()
        )
        print(
            f"{targets:11s} {mine:6.3f} {other:6.3f}  {other / mine:5.2f} × the tokens/s   "
            f"{my_peak:5.2f} {other_peak:5.2f}  {my_peak / other_peak:4.2f} × the memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
