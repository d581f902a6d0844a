"""`surgery merge`, `export`, `undo`, `redo`, `log`: folders made, changed, and changed back."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.operation import OperationOptions
from nanogpt_surgery.cli.framework.options import (
    WITH_ADAPTER,
    AdapterFolder,
    AllLayers,
    Json,
    Model,
    Overwrite,
    check_out,
    given,
    next_command,
)
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.report import Report, wrapped

Form = Literal["F32", "F16", "BF16", "Q8_0", "huggingface", "lora-gguf", "mlx", "vllm"]
Folder: TypeAlias = Annotated[Path, Parameter(help="a run or a model folder")]
HEADING = ("", "when", "operation", "state", "files")


@Parameter(name="*", group="Merging")
@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge_adapter` and `merge_into_gguf`; None: their defaults."""

    tolerance: float | None = None
    """largest mean KL divergence, adapted model to written one, in nats a token; by default 0.001,
    and 0.01 for Q8_0, which rounds all of the model"""
    force: bool = False
    """write whatever was measured, and although the adapter was made for another base"""
    tied: Tied | None = None
    """what to do where the adapter changes a weight that layers share; by default what it was made
    with"""


def merge(
    model: str,
    adapter: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    operation: OperationOptions = OperationOptions(),
    options: MergeOptions = MergeOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Add an adapter's ΔW to a model's weights, in place (surgery undo takes it back) or elsewhere.

    Args:
        model: a run or a model folder; with --out also a GGUF file or a hub name
        adapter: an adapter folder, as finetune or peft writes it
        dtype: of all weights to write; by default each keeps the one that it is stored in
    """
    from nanogpt_surgery.formats.folders.merging import merge_adapter

    how = operation.arguments(model) | {"dtype": dtype} | given(options)
    show(merge_adapter(model, adapter, operation.out, **how), json, all_layers)
    operation.say(model)


def export(
    model: Model,
    *,
    out: Path,
    overwrite: Overwrite = False,
    form: Annotated[Form, Parameter(name="--format")] = "F16",
    adapter: AdapterFolder = None,
    rank: int | None = None,
    probe: Path | None = None,
    options: MergeOptions = MergeOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Write a model or an adapter for other programs; it is read again and compared.

    A model becomes a GGUF file for llama.cpp, or a Hugging Face folder; an adapter a file for
    llama.cpp, or a folder for MLX, or for vLLM and SGLang. With an adapter, a model's file or
    folder holds the merged one, measured as surgery merge does; a folder's weights keep the
    precision they are stored in.

    Args:
        out: the file to make; for huggingface, mlx and vllm the folder
        form: of a GGUF's matrices, or huggingface; or the adapter alone, as lora-gguf, mlx or vllm
        rank: with vllm: bring each layer's change to its nearest product of this rank, and show the
            error
        probe: a text to measure a merge on, in the model's tokens; without it, random tokens
    """
    from nanogpt_surgery.formats.model_file import check_adapter

    check_adapter(model, WITH_ADAPTER)
    check_out(out, overwrite, is_file=form not in ("huggingface", "mlx", "vllm"))
    if rank is not None and form != "vllm":
        raise SurgeryError(f"--rank {rank} is of --format vllm alone")
    report = _write(model, out, form, adapter, probe, options, rank)
    if report:
        show(report, json, all_layers)
    say(f"wrote {out}, and read it again")
    say(_next_step(model, out, form, report))


def _next_step(model: str, out: Path, form: Form, report: Report | None) -> str:
    """Returns the command that uses what was written."""
    place, base = shlex.quote(str(out)), shlex.quote(model)
    if form == "lora-gguf":
        return f"llama-cli -m MODEL.gguf --lora {place}, with {model} as a GGUF"
    if form == "mlx":
        return f"mlx_lm.generate --model {base} --adapter-path {place} --prompt …"
    if form == "vllm" and report is not None:
        lora = f"--enable-lora --lora-modules NAME={place}"
        return f"vllm serve {base} {lora} --max-lora-rank {report.summary['rank']}"
    return next_command(out)


def _write(
    model: str,
    out: Path,
    form: Form,
    adapter: Path | None,
    probe: Path | None,
    options: MergeOptions,
    rank: int | None,
) -> Report | None:
    """Writes the model, the adapter or both as one; what is measured is reported."""
    from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
    from nanogpt_surgery.formats.gguf.writing import save_gguf
    from nanogpt_surgery.formats.model_file import open_model, save_model
    from nanogpt_surgery.formats.peft.export import save_lora_gguf, save_mlx_adapter
    from nanogpt_surgery.formats.peft.reading import load_adapter
    from nanogpt_surgery.formats.peft.vllm import save_vllm_adapter
    from nanogpt_surgery.model.finite import check_finite_weights

    if form == "lora-gguf" or form == "mlx" or form == "vllm":
        if adapter is None:
            raise SurgeryError(
                "this form is an adapter's, and none is named", "add --adapter FOLDER"
            )
        network, _ = open_model(model, "each")
        load_adapter(network, adapter, force=options.force, tied=options.tied)
        if form == "vllm":
            return save_vllm_adapter(network, out, model, rank=rank)
        (save_lora_gguf if form == "lora-gguf" else save_mlx_adapter)(network, out)
        return None
    if adapter is not None:
        text = read_texts([probe]) if probe else None
        if form == "huggingface":
            return merge_adapter(model, adapter, out, probe=text, **given(options))
        return merge_into_gguf(model, adapter, out, form, probe=text, **given(options))
    network, tokenizer = open_model(model, "each")
    if form != "huggingface":
        return save_gguf(network, out, tokenizer, form)
    check_finite_weights(network, model)
    save_model(network, out, tokenizer, model)
    return None


def undo(folder: Folder, *, json: Json = False) -> None:
    """Take the last operation on a folder back: every file has the bytes it had."""
    from nanogpt_surgery.history.folder_history import undo_folder

    show(undo_folder(folder), json)
    say(f"surgery redo {folder} does it again")


def redo(folder: Folder, *, json: Json = False) -> None:
    """Do the operation on a folder again that was undone last."""
    from nanogpt_surgery.history.folder_history import redo_folder

    show(redo_folder(folder), json)
    say(f"surgery undo {folder} takes it back")


def log(folder: Path, *, json: Json = False) -> None:
    """List the operations on a folder: when, what, on which base, with which result, their state.

    Args:
        folder: a run, a model or an adapter folder; operations/journal.jsonl in it holds every hash
    """
    from nanogpt_surgery.history.folder_history import folder_log

    found = folder_log(folder)
    if json:
        show(found, json)
        return
    width = shutil.get_terminal_size().columns
    lines = [part for line in _paragraphs(found) for part in wrapped(line, width)]
    print(printable("\n".join(lines)))


def _paragraphs(found: Report) -> Iterator[str]:
    """The lines of each operation, below its heading, with a line for each of its files."""
    yield found.title
    for row in found.rows:
        yield f"  {row['']}  {row['when']}  {row['operation']}: {row['state']}"
        known = {k: v for k, v in row.items() if k not in HEADING and v not in (None, "")}
        more = str(Report("", [], known)).splitlines()[1:]
        yield from (f"     {line}" for line in (*row["files"].split(", "), *more))
    yield from str(Report("", [], found.summary)).splitlines()[1:]
