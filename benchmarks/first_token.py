"""A new process until its first token: each contender loads only what it needs itself.

    first_token.py NAME FOLDER PRECISION PROMPT

Run by `generate.py`, which made FOLDER; PROMPT is a list of ids in JSON. Prints the most memory
that the process has held, in KiB, once the token is there.
"""

import json
import os
import resource
import sys
from pathlib import Path


def ours(place: Path, precision: str, prompt: list[int], engine: str) -> None:
    """Our `open_model` and `generate`."""
    from nanogpt_surgery import generate, open_model

    if precision in ("int8", "int4"):
        model = open_model(place / "model.gguf", quantize=precision)[0]
    else:
        import torch

        model = open_model(place / "model", getattr(torch, precision))[0]
    next(iter(generate(model, prompt, 1, 0, engine=engine)))


def transformers(place: Path, precision: str, prompt: list[int]) -> None:
    """Transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        place / "model", dtype=getattr(torch, precision)
    ).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)


def llama_cpp(place: Path, prompt: list[int]) -> None:
    """llama.cpp's server inside this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = str(place / "model.gguf"), 512, 0
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0})


def peak_kib() -> int:
    """Returns the most memory that this process has held; getrusage counts its parent's as well."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Makes the token."""
    name, folder, precision, prompt = sys.argv[1:]
    place, ids = Path(folder), json.loads(prompt)
    if name == "transformers":
        transformers(place, precision, ids)
    elif name == "llama.cpp":
        llama_cpp(place, ids)
    else:
        ours(place, precision, ids, name.removeprefix("ours, "))
    print(peak_kib(), flush=True)


if __name__ == "__main__":
    main()
