"""A model on disk and an adapter on disk become a merged model for llama.cpp."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nanogpt_surgery.files.atomic import whole_file
from nanogpt_surgery.formats.folders.measured_merge import add_in
from nanogpt_surgery.formats.folders.merge_preparation import prepare
from nanogpt_surgery.formats.gguf.writing import GGUFType, rounding_of, write_gguf_file
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.report import Report


def merge_into_gguf(
    model: str | Path,
    adapter: str | Path,
    path: str | Path,
    kind: GGUFType = "F16",
    *,
    tolerance: float | None = None,
    force: bool = False,
    probe: str | None = None,
    tied: Tied | None = None,
) -> Report:
    """Merge an adapter folder into a model in float32, rounded once to a GGUF file's types.

    Args:
        model: whatever `open_model` opens; it stays as it is.
        adapter: an adapter folder, as finetune or peft writes it.
        path: made, or replaced if it is a GGUF file.
        kind: of the matrices.
        tolerance: largest mean KL divergence, adapted model to written one, in nats a token; by
            default 0.001, and 0.01 for Q8_0, which rounds all of the model.
        force: write whatever was measured, and although the adapter was made for another base.
        probe: a text to measure on; random tokens if None.
        tied: what to do where the adapter changes a weight that layers share: "refuse", "untie" or
            "both"; by default what it was made with.

    Returns:
        A row for each layer: how much of ΔW the file's rounding leaves; and the written model's
        logits against the adapted one's.

    Raises:
        SurgeryError: as `merge_adapter` and `save_gguf`. There is no new file then.
    """
    merge = prepare(model, adapter, dtype="float32", probe=probe, force=force, tied=tied)
    most = (1e-2 if kind == "Q8_0" else 1e-3) if tolerance is None else tolerance
    merged = add_in(merge, partial(rounding_of, kind=kind), most, force)
    with whole_file(path) as temporary:
        again, written = write_gguf_file(merge.model, temporary, merge.tokenizer, kind, "")
        effect = merged.measure(again)
    summary = {"file": str(path), "layers": len(merged.rows), "base": merge.base, **effect}
    stored = {f"stored_as_{row['stored as']}": row["tensors"] for row in written.rows}
    return Report(f"merged: {merge.title} into {model}", merged.rows, summary | stored)
