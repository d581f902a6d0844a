"""`surgery export`: a model, or an adapter, for other programs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, Json, say, show
from nanogpt_surgery.cli.framework.options import Overwrite, check_out, given
from nanogpt_surgery.cli.model_options import WITH_ADAPTER, AdapterFolder, Model, next_command
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import Tied

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report

Form = Literal["F32", "F16", "BF16", "Q8_0", "huggingface", "lora-gguf", "mlx"]


@Parameter(name="*", group="With an adapter")
@dataclass(frozen=True)
class MergedOptions:
    """Options of `merge_into_gguf`, with its defaults."""

    tolerance: float | None = None
    """largest mean KL divergence, adapted model to written one, in nats a token; by default 0.001,
    and 0.01 for Q8_0, which rounds all of the model"""
    force: bool = False
    """write whatever was measured, and although the adapter was made for another base"""
    tied: Tied | None = None
    """what to do where the adapter changes a weight that layers share; by default what it was made
    with"""


DEFAULT_MERGED = MergedOptions()


def export(
    model: Model,
    *,
    out: Path,
    overwrite: Overwrite = False,
    form: Annotated[Form, Parameter(name="--format")] = "F16",
    adapter: AdapterFolder = None,
    probe: Path | None = None,
    options: MergedOptions = DEFAULT_MERGED,
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Write a model or an adapter for other programs; it is read again and compared.

    A model becomes a GGUF file for llama.cpp, or a Hugging Face folder; an adapter a file for
    llama.cpp, or a folder for MLX. With an adapter, a model's file or folder holds the merged one,
    measured as surgery merge does; a folder's weights keep the precision they are stored in.

    Parameters
    ----------
    out
        the file to make; for huggingface and mlx the folder
    form
        the type of a GGUF's matrices, or huggingface; or the adapter alone, as lora-gguf or mlx
    probe
        a text to measure a merge on, in the model's tokens; without it, random tokens
    """
    from nanogpt_surgery.formats.model_file import check_adapter

    check_adapter(model, WITH_ADAPTER)
    check_out(out, overwrite, is_file=form not in ("huggingface", "mlx"))
    if report := _write(model, out, form, adapter, probe, options):
        show(report, json, all_layers)
    say(f"wrote {out}, and read it again")
    place = shlex.quote(str(out))
    if form == "lora-gguf":
        say(f"llama-cli -m MODEL.gguf --lora {place}, with {model} as a GGUF")
    elif form == "mlx":
        say(f"mlx_lm.generate --model {shlex.quote(model)} --adapter-path {place} --prompt …")
    else:
        say(next_command(out))


def _write(
    model: str,
    out: Path,
    form: Form,
    adapter: Path | None,
    probe: Path | None,
    options: MergedOptions,
) -> Report | None:
    """Writes the model, the adapter or both as one; what is measured is reported."""
    from nanogpt_surgery.data.text.corpus import read_texts
    from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
    from nanogpt_surgery.formats.gguf.writing import save_gguf
    from nanogpt_surgery.formats.model_file import open_model, save_model
    from nanogpt_surgery.formats.peft.export import save_lora_gguf, save_mlx_adapter
    from nanogpt_surgery.formats.peft.reading import load_adapter
    from nanogpt_surgery.model.finite import check_finite_weights

    if form == "lora-gguf" or form == "mlx":
        if adapter is None:
            raise SurgeryError(
                "this form is an adapter's, and none is named", "add --adapter FOLDER"
            )
        network, _ = open_model(model, "each")
        load_adapter(network, adapter, force=options.force, tied=options.tied)
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
