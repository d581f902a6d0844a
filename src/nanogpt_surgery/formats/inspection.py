"""Reports on what a path holds: the tree of a model's modules, or the updates of an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.formats.gguf.file import is_gguf
from nanogpt_surgery.formats.gguf.model import types_in
from nanogpt_surgery.formats.huggingface.config import family_of
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.formats.peft.layout import split
from nanogpt_surgery.formats.peft.reading import adapter_folder, read_adapter
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, Updates, singular_values
from nanogpt_surgery.report import Report

LARGEST_FACTOR = 1 << 24  # numbers of a factor; larger ones are not read for their norm
MOST_READ = 1 << 30  # numbers of an adapter
NORMS = ("norm of ΔW", "largest singular value", "rank of ΔW")
PARTS_RANKS = "r of its parts"
FUSED, PARTS = "attn.c_attn", ("q_proj", "k_proj", "v_proj")
KINDS = {  # of a tokenizer.json
    "BPE": "byte pairs (BPE)",
    "Unigram": "pieces of words (Unigram)",
    "WordPiece": "pieces of words (WordPiece)",
    "WordLevel": "whole words",
}
ABOUT_FUSED = (
    "c_attn is GPT-2's q_proj, k_proj and v_proj in one matrix, and so is its update: parts made "
    "apart stand in it with A stacked, B on a block diagonal and r their sum; else they share A"
)


def describe_model(path: str) -> Report:
    """Returns a row for each module of a model (kind, shapes, dtypes, parameters) and a summary."""
    model, tokenizer = open_model(path)
    config = model.config
    types = types_in(path) if is_gguf(Path(path)) else {}  # GGUF's names for them
    if config.tie_head and types:
        types["lm_head.weight"] = types["embed_tokens.weight"]
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        dtypes = {
            key: str(parameter.dtype).removeprefix("torch.") for key, parameter in own.items()
        }
        stored = {types.get(f"{name}.{key}", dtype) for key, dtype in dtypes.items()}
        rows.append(
            {
                "module": name or "model",
                "kind": type(module).__name__,
                "shape": ", ".join("×".join(map(str, p.shape)) for p in own.values()),
                "parameters": sum(p.numel() for p in module.parameters()),
                "dtype": ", ".join(sorted(stored)),
            }
        )
    summary = {
        "family": family_of(config),
        "parameters": model.n_parameters,
        "head": "tied to the embedding" if config.tie_head else "its own matrix",
        "context": config.block_size,
        "forward_flops_per_token": config.flops_per_token(),
        "tokenizer": f"{_kind_of(tokenizer)}, {config.vocab_size:,} ids" if tokenizer else "none",
    }
    return Report(f"model {path}", rows, summary)


def _kind_of(tokenizer: Tokenizer) -> str:
    """The kind of a tokenizer in plain words."""
    if isinstance(tokenizer, CharacterTokenizer):
        return "characters, an id each"
    if isinstance(tokenizer, PretrainedTokenizer):
        kind = tokenizer.to_json()["model"].get("type")
        return f"{KINDS.get(kind, kind or 'of an unnamed kind')}, from a tokenizer.json"
    return KINDS["BPE"]


def describe_adapter(path: str) -> Report:
    """Returns a row for each update of an adapter: its layer, r, alpha, and the norms of its ΔW.

    Factors beyond 2^24 numbers, or all beyond 2^30, have no norms.
    """
    updates = read_adapter(adapter_folder(path)).updates
    unknown = dict.fromkeys(NORMS)
    rows: dict[str, dict[str, Any]] = {}
    for name, update in updates.items():
        shape = f"{update.B.size(0)}×{update.A.size(1)}"
        about = {"layer": name, "shape": shape, "r": update.rank, "alpha": update.alpha}
        rows[name] = about | unknown
    measured = _small_enough(updates)
    for names in _alike(measured):
        _add_norms({name: rows[name] for name in names}, measured)
    parts = {name: _ranks_of_parts(u) for name, u in measured.items() if name.endswith(FUSED)}
    summary: dict[str, Any] = {"layers": len(rows)}
    if len(measured) < len(rows):
        summary["layers too large for norms"] = len(rows) - len(measured)
    broken = sum(rows[name][NORMS[0]] is None for name in measured)
    if broken:
        summary["layers that are not finite"] = broken
    if parts:
        summary["fused"] = ABOUT_FUSED
        for name, row in rows.items():
            row[PARTS_RANKS] = parts.get(name)
    return Report(f"adapter {path}", list(rows.values()), summary)


def _small_enough(updates: Updates) -> Updates:
    """The updates that are read for their norms, in the order of the file."""
    left, found = MOST_READ, {}
    for name, update in updates.items():
        left -= update.A.numel() + update.B.numel()
        if max(update.A.numel(), update.B.numel()) <= LARGEST_FACTOR and left >= 0:
            found[name] = update
    return found


def _alike(updates: Updates) -> Iterator[list[str]]:
    """The names of updates that have one shape, as many at a time as may be in float32 at once."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, update in updates.items():
        shapes.setdefault((*update.A.shape, *update.B.shape), []).append(name)
    for (rank, n_in, n_out, _), names in shapes.items():
        count = max(1, LARGEST_FACTOR // (rank * (n_in + n_out)))
        yield from (names[i : i + count] for i in range(0, len(names), count))


def _add_norms(rows: dict[str, dict[str, Any]], updates: Updates) -> None:
    """Adds the norms of updates of one shape to their rows."""
    values = singular_values([updates[name] for name in rows]).double()  # (N, R)
    largest = values.amax(1)  # (N)
    ranks = (values > largest[:, None] * 1e-6).sum(1)  # (N)
    columns = [values.square().sum(1).sqrt().tolist(), largest.tolist(), ranks.tolist()]
    for row, *norms in zip(rows.values(), *columns, strict=True):
        if math.isfinite(norms[0]):
            row.update(zip(NORMS, norms, strict=True))


def _ranks_of_parts(mapped: LowRankUpdate) -> str:
    update = replace(mapped, A=mapped.A.float(), B=mapped.B.float())
    return ", ".join(f"{part} {share.rank}" for part, share in split(update, PARTS).items())
