"""`surgery inspect`: what a model or an adapter is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, show

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

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.lora.stored_adapter import LowRankUpdate
    from nanogpt_surgery.report import Report


def inspect(
    path: str,
    *,
    all_layers: AllLayers = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show the tree of a model's modules, or the updates of an adapter.

    Parameters
    ----------
    path
        a run, a model folder, a GGUF file, a hub name or an adapter folder
    json
        print it as JSON
    """
    report = (
        _adapter_report(path)
        if (Path(path) / "adapter_config.json").is_file()
        else _model_report(path)
    )
    show(report, json, all_layers)


def _model_report(path: str) -> Report:
    from nanogpt_surgery.formats.gguf.file import is_gguf
    from nanogpt_surgery.formats.gguf.model import types_in
    from nanogpt_surgery.formats.huggingface.model_folder import family_of
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.report import Report

    model, tokenizer = open_model(path)
    types = types_in(path) if is_gguf(Path(path)) else {}
    if model.config.tie_head and types:
        types["lm_head.weight"] = types["embed_tokens.weight"]
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        rows.append(
            {
                "module": name or "model",
                "kind": type(module).__name__,
                "shape": ", ".join("×".join(map(str, p.shape)) for p in own.values()),
                "parameters": sum(p.numel() for p in module.parameters()),
                "dtype": ", ".join(sorted({_dtype(name, key, own[key], types) for key in own})),
            }
        )
    config = model.config
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
    from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer

    if isinstance(tokenizer, CharacterTokenizer):
        return "characters, an id each"
    if isinstance(tokenizer, BPETokenizer):
        return "byte pairs (BPE)"
    if isinstance(tokenizer, PretrainedTokenizer):
        kind = tokenizer.to_json()["model"].get("type")
        return f"{KINDS.get(kind, kind or 'of an unnamed kind')}, from a tokenizer.json"
    return "of another program"


def _dtype(module: str, key: str, parameter: Tensor, types: dict[str, str]) -> str:
    """What a file stores a parameter as, by GGUF's name for it; its dtype in other files."""
    return types.get(f"{module}.{key}", str(parameter.dtype).removeprefix("torch."))


def _adapter_report(path: str) -> Report:
    from nanogpt_surgery.formats.peft.adapter_file import read_adapter
    from nanogpt_surgery.formats.peft.adapter_layout import adapter_folder
    from nanogpt_surgery.formats.peft.fused_update import split
    from nanogpt_surgery.report import Report

    updates = read_adapter(adapter_folder(path))
    rows = [_adapter_row(name, update) for name, update in updates.items()]
    summary = {"layers": len(rows)}
    parts = {n: split(u, PARTS) for n, u in updates.items() if n.endswith(FUSED)}
    if not parts:
        return Report(f"adapter {path}", rows, summary)
    for row in rows:
        ranks = [f"{name} {part.rank}" for name, part in parts.get(row["layer"], {}).items()]
        row["r of its parts"] = ", ".join(ranks) or None
    return Report(f"adapter {path}", rows, summary | {"fused": ABOUT_FUSED})


def _adapter_row(name: str, update: LowRankUpdate) -> dict[str, Any]:
    values = update.singular_values
    floor = values.max() * 1e-6
    return {
        "layer": name,
        "shape": f"{update.B.size(0)}×{update.A.size(1)}",
        "r": update.rank,
        "alpha": update.alpha,
        "norm of ΔW": float(values.square().sum().sqrt()),
        "largest singular value": float(values.max()),
        "rank of ΔW": int((values > floor).sum()),
    }
