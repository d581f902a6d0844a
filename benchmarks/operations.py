"""Operations on models of three sizes: ours beside peft's, in turns, each in its own process.

    uv run benchmarks/operations.py [--sizes 134M 374M 1.26B] [--turns 1]

Llama shapes in bfloat16 with random weights and an adapter of rank 8 on every Linear but the head.
Both sides open the same two folders. Of peft these are `PeftModel.from_pretrained`,
`merge_and_unload` and `save_pretrained`; ours also hashes, measures what survives the rounding, can
undo, and reads again what it writes. `folder` is all of it, from two folders to the merged one.

Prints seconds on the clock and of the processor (medians over the turns), the ratio of the latter,
and for each operation the peak of the memory that belongs to the process alone, in MiB beyond what
it held before: files that are mapped can be dropped at any time and do not count. Where the system
does not say, the memory is 0. On a busy machine set OMP_NUM_THREADS=1 and compare the latter.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SIZES = {  # layers, width, heads, width of the feed-forward
    "134M": (12, 768, 12, 2048),
    "374M": (24, 1024, 16, 2816),
    "1.26B": (22, 2048, 32, 5632),
}
OPERATIONS = ("open", "inject", "load", "disable", "enable", "remove", "merge", "undo", "save",
              "folder", "folder undo", "gguf")  # fmt: skip


def make(size: str, place: Path) -> None:
    """Writes the model and the adapter that both sides open."""
    import torch

    from nanogpt_surgery import GPTConfig, SimpleGPT, inject_lora, save_adapter, save_model
    from nanogpt_surgery.lora.several import lora_layers

    layers, width, heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = GPTConfig.for_family(
        "llama", vocab_size=32000, n_embd=width, n_head=heads, n_kv_head=heads, n_layer=layers,
        n_inner=inner, block_size=2048, tie_head=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = SimpleGPT.from_config(config)
    torch.set_default_dtype(torch.float32)
    save_model(model, place / "model")
    inject_lora(model, "all-linear")
    for layer in lora_layers(model).values():  # each change about a step of bfloat16
        torch.nn.init.normal_(layer.lora_B, std=2e-3)
    save_adapter(model, place / "adapter", str(place / "model"))


class Clock:
    """Of each operation, by name: seconds on the clock, seconds of the processor, peak memory."""

    def __init__(self) -> None:
        self.measured: dict[str, tuple[float, float, float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measures a block; the memory is looked at a hundred times a second."""
        gc.collect()
        before, peak, done = own_memory(), own_memory(), threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.01):
                peak = max(peak, own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, used = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds, used = time.perf_counter() - start, time.process_time() - used
            done.set()
            watcher.join()
        self.measured[name] = seconds, used, (max(peak, own_memory()) - before) / 1024


def own_memory() -> int:
    """KiB of this process that no file holds."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def ours(place: Path, clock: Clock) -> None:
    """Every operation of ours, on a model in memory and on folders."""
    import nanogpt_surgery as ns
    from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
    from nanogpt_surgery.history.folder_history import undo_folder

    with clock.time("open"):
        model, _ = ns.open_model(place / "model")
    with clock.time("inject"):
        ns.inject_lora(model, "all-linear")
    with clock.time("remove"):
        ns.remove_lora(model)
    with clock.time("load"):
        ns.load_adapter(model, place / "adapter")
    with clock.time("disable"):
        ns.disable_lora(model)
    with clock.time("enable"):
        ns.enable_lora(model)
    with clock.time("merge"):
        ns.merge_lora(model)
    with clock.time("undo"):
        ns.undo_lora(model)
    ns.redo_lora(model)
    with clock.time("save"):
        ns.save_model(model, place / "ours")
    del model
    with clock.time("folder"):
        merge_adapter(place / "model", place / "adapter", place / "merged", tolerance=9)
    merge_adapter(place / "model", place / "adapter", tolerance=9)
    with clock.time("folder undo"):
        undo_folder(place / "model")
    with clock.time("gguf"):
        merge_into_gguf(place / "model", place / "adapter", place / "merged.gguf", tolerance=9)


def peft(place: Path, clock: Clock) -> None:
    """What peft does of it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def opened() -> object:
        return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)

    with clock.time("open"):
        model = opened()
    with clock.time("load"):
        model = PeftModel.from_pretrained(model, place / "adapter")
    with clock.time("merge"):
        model = model.merge_and_unload()
    with clock.time("save"):
        model.save_pretrained(place / "theirs")
    del model
    with clock.time("folder"):
        model = PeftModel.from_pretrained(opened(), place / "adapter").merge_and_unload()
        model.save_pretrained(place / "theirs")


SIDES: dict[str, Callable[[Path, Clock], None]] = {"ours": ours, "peft": peft}


def measure(who: str, place: Path) -> dict[str, tuple[float, float, float]]:
    """What `Clock` measures of each operation, in a new process."""
    command = [sys.executable, __file__, "--child", who, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, tuple[float, float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(size: str, turns: int) -> Iterator[str]:
    """A row for each operation on a model of a size."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, __file__, "--make", size, folder], check=True)
        found: dict[str, list[dict[str, tuple[float, float, float]]]] = {who: [] for who in SIDES}
        for _ in range(turns):
            for who, results in found.items():
                results.append(measure(who, place))
    for name in OPERATIONS:
        values = []
        for results in found.values():
            pairs = [result[name] for result in results if name in result]
            values.append([statistics.median(v) for v in zip(*pairs, strict=True)] if pairs else [])
        (seconds, used, mib), theirs = values
        ratio = f"{theirs[1] / used:.2f}" if theirs else ""
        others = (
            [f"{theirs[0]:.2f}", f"{theirs[1]:.2f}", f"{theirs[2]:,.0f}"] if theirs else [""] * 3
        )
        cells = [size, name, f"{seconds:.2f}", others[0], f"{used:.2f}", others[1], ratio]
        yield f"| {' | '.join([*cells, f'{mib:,.0f}', others[2]])} |"


def main() -> None:
    """Measure and print a table."""
    if sys.argv[1:2] == ["--child"]:
        clock = Clock()
        SIDES[sys.argv[2]](Path(sys.argv[3]), clock)
        print(json.dumps(clock.measured))
        return
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    print(
        "| size | operation | ours, s | peft, s | ours, s of the processor | peft | × | ours, MiB "
        "| peft, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        for row in rows(size, options.turns):
            print(row, flush=True)


if __name__ == "__main__":
    main()
