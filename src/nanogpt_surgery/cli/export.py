"""`surgery export`: a model, or an adapter, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nanogpt_surgery.cli.console import say, show
from nanogpt_surgery.cli.opening import Force

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

Form = Literal["F32", "F16", "BF16", "Q8_0", "huggingface", "lora-gguf", "mlx"]


def export(
    model: str,
    *,
    out: Path,
    form: Form = "F16",
    adapter: Path | None = None,
    force: Force = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a model or an adapter for other programs; it is read again and compared.

    A model becomes a GGUF file for llama.cpp, or a Hugging Face folder; an adapter a file for
    llama.cpp, or a folder for MLX. With an adapter, a model's file or folder holds the merged one.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    out
        the file to make; for huggingface and mlx the folder
    form
        the type of a GGUF's matrices, or huggingface; or the adapter alone, as lora-gguf or mlx
    adapter
        an adapter folder, as finetune or peft writes it
    json
        print the report as JSON
    """
    from nanogpt_surgery.formats.adapter_export import save_lora_gguf, save_mlx_adapter
    from nanogpt_surgery.formats.gguf_write import save_gguf
    from nanogpt_surgery.formats.model_file import save_model

    network, tokenizer = _opened(model, adapter, form in ("lora-gguf", "mlx"), force)
    if form == "lora-gguf":
        save_lora_gguf(network, out)
    elif form == "mlx":
        save_mlx_adapter(network, out)
    elif form == "huggingface":
        save_model(network, out, tokenizer)
    else:
        show(save_gguf(network, out, tokenizer, form), json)
    say(f"wrote {out}, and read it again")


def _opened(
    model: str, adapter: Path | None, alone: bool, force: bool
) -> tuple[SimpleGPT, Tokenizer | None]:
    """A model with its tokenizer; its adapter is merged in, unless that is to be written alone."""
    from nanogpt_surgery.errors import SurgeryError
    from nanogpt_surgery.formats.adapter_layout import load_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.operations import merge_lora

    network, tokenizer = open_model(model)
    if adapter is None and alone:
        raise SurgeryError("this form is an adapter's, and none was named", "add --adapter FOLDER")
    if adapter is not None:
        load_adapter(network, adapter, force=force)
        if not alone:
            merge_lora(network, keep_originals=False)
    return network, tokenizer
