"""Opening a model to use it: with adapters on it, all in one dtype, and its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nanogpt_surgery.data.conversations.chat import (
    ChatTemplate,
    named_template,
    template_from_jinja,
)
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.errors import SurgeryError, warn
from nanogpt_surgery.formats.gguf.file import is_gguf
from nanogpt_surgery.formats.huggingface.tokenizer_files import chat_template_in
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
from nanogpt_surgery.formats.placing import usual_dtype
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.operations import swap_lora
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.model.quantized import Quantization, check_computes_in, quantize_layers
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def open_with_adapters(
    path: str | Path,
    adapters: Sequence[tuple[str, Path]],
    dtype: torch.dtype | None = None,
    *,
    tied: Tied | None = None,
    force: bool = False,
    bfloat16: bool = True,
    quantize: Quantization | None = None,
) -> tuple[SimpleGPT, Tokenizer]:
    """Opens a model with its tokenizer and named adapters; the first of them takes part alone.

    All weights get one dtype, None: that of most of them; updates stay in float32. Without
    `bfloat16` the processor has no arithmetic for it: weights that are stored so are float32 if no
    dtype is asked for, with a warning. To `quantize` under adapters, the weights of a folder are
    rounded when it has been seen that they are those of the adapters. Else see `open_model` and
    `load_adapter`.

    Raises:
        SurgeryError: one of them does not open, or there is no tokenizer.
    """
    if quantize is not None:
        dtype = check_computes_in(dtype)
    # An adapter knows its base by the weights as they are stored, in a GGUF file as its blocks.
    if adapters and not (quantize is not None and is_gguf(Path(path))):
        model, found = open_model(path, "each")
    else:
        model, found = open_model(path, dtype, quantize=quantize)
    tokenizer = required_tokenizer(found, str(path))
    dtype = dtype or _usual_dtype(model, bfloat16)
    if dtype == torch.float32:
        model.float()
    for name, folder in adapters:
        load_adapter(model, folder, name=name, tied=tied, force=force)
    _cast(model, dtype)
    if quantize is not None and adapters:
        quantize_layers(model, quantize)  # those that are not yet
        history_of(model).settle()  # lets go of the weights as they were
        history_of(model).trainable_before = ()
    if adapters:
        swap_lora(model, adapters[0][0])
    return model, tokenizer


def _usual_dtype(model: SimpleGPT, bfloat16: bool) -> torch.dtype:
    """Returns the dtype of most weights; float32 for bfloat16 without arithmetic for it."""
    dtype = usual_dtype((weight.dtype, weight.numel()) for weight in model.parameters())
    if dtype != torch.bfloat16 or bfloat16:
        return dtype
    warn(
        "the weights are bfloat16, which this processor has no arithmetic for: computing "
        f"in float32, with {4 * model.n_parameters / 2**20:,.0f} MiB of weights instead of "
        "half of that; dtype='bfloat16' leaves them"
    )
    return torch.float32


def _cast(model: SimpleGPT, dtype: torch.dtype) -> None:
    """Gives all weights a dtype but those of updates: A and B stay in float32."""
    updates = [module for module in model.modules() if isinstance(module, LoRAUpdate)]
    kept = {parameter for update in updates for parameter in update.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)


def chat_template(
    tokenizer: Tokenizer, name: str = "auto", adapter: Path | None = None
) -> ChatTemplate:
    """Returns the template of a name; "auto": as the adapter was trained, else the model's own.

    Raises:
        SurgeryError: the adapter's file is damaged, or beyond its limits.
    """
    if name != "auto":
        return named_template(tokenizer, name)
    text = None if adapter is None else chat_template_in(adapter_folder(adapter))
    if text is None:
        return named_template(tokenizer, "model")
    return template_from_jinja(tokenizer, text)


def template_to_talk(
    tokenizer: Tokenizer, name: str = "auto", adapter: Path | None = None
) -> ChatTemplate:
    """Returns `chat_template`, but "none" where our plain one is not in the vocabulary."""
    found = chat_template(tokenizer, name, adapter)
    if name in ("auto", "model") and (found.source, found.owner) == ("plain", "model"):
        try:
            tokenizer.encode("System:\nUser:\nAssistant:\n")
        except SurgeryError:  # a vocabulary of characters without these
            return replace(found, source="none")
    return found
