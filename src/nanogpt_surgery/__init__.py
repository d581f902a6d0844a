"""A GPT you can open up: the public names.

They are loaded when first used, so that importing the package, as the command line does, does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.corpus import (
        python_reference,
        python_source,
        read_texts,
        split_by_position,
    )
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
    from nanogpt_surgery.formats.adapter_layout import load_adapter, save_adapter
    from nanogpt_surgery.formats.model_file import open_model, save_model
    from nanogpt_surgery.generation.generate import generate
    from nanogpt_surgery.lora.examination import merge_survival
    from nanogpt_surgery.lora.forecast import plan_lora
    from nanogpt_surgery.lora.hashing import tensor_hashes
    from nanogpt_surgery.lora.learning import learned
    from nanogpt_surgery.lora.lora_embedding import LoRAEmbedding
    from nanogpt_surgery.lora.lora_linear import LoRALinear
    from nanogpt_surgery.lora.mixing import blend_lora, lora_rows, swap_lora
    from nanogpt_surgery.lora.operations import (
        disable_lora,
        enable_lora,
        inject_lora,
        merge_lora,
        remove_lora,
        unmerge_lora,
    )
    from nanogpt_surgery.lora.undo import lora_log, redo_lora, undo_lora
    from nanogpt_surgery.model.config import FAMILIES, GPTConfig, RopeScaling
    from nanogpt_surgery.model.kv_cache import KVCache
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.model.transformer_encoder_layer import TransformerEncoderLayer
    from nanogpt_surgery.training.fit import Step, fit
    from nanogpt_surgery.training.loss import evaluate
    from nanogpt_surgery.training.settings import FitSettings

_HOMES = {
    "data.character_tokenizer": ("CharacterTokenizer",),
    "data.corpus": ("python_reference", "python_source", "read_texts", "split_by_position"),
    "data.gpt_dataset": ("GPTDataset",),
    "data.tokenizer": ("Tokenizer",),
    "errors": ("SurgeryError", "SurgeryWarning"),
    "formats.adapter_layout": ("load_adapter", "save_adapter"),
    "formats.model_file": ("open_model", "save_model"),
    "generation.generate": ("generate",),
    "lora.examination": ("merge_survival",),
    "lora.forecast": ("plan_lora",),
    "lora.hashing": ("tensor_hashes",),
    "lora.learning": ("learned",),
    "lora.lora_embedding": ("LoRAEmbedding",),
    "lora.lora_linear": ("LoRALinear",),
    "lora.mixing": ("blend_lora", "lora_rows", "swap_lora"),
    "lora.operations": (
        "disable_lora",
        "enable_lora",
        "inject_lora",
        "merge_lora",
        "remove_lora",
        "unmerge_lora",
    ),
    "lora.undo": ("lora_log", "redo_lora", "undo_lora"),
    "model.config": ("FAMILIES", "GPTConfig", "RopeScaling"),
    "model.kv_cache": ("KVCache",),
    "model.simple_gpt": ("SimpleGPT",),
    "model.transformer_encoder_layer": ("TransformerEncoderLayer",),
    "training.fit": ("Step", "fit"),
    "training.loss": ("evaluate",),
    "training.settings": ("FitSettings",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FAMILIES",
    "CharacterTokenizer",
    "FitSettings",
    "GPTConfig",
    "GPTDataset",
    "KVCache",
    "LoRAEmbedding",
    "LoRALinear",
    "RopeScaling",
    "SimpleGPT",
    "Step",
    "SurgeryError",
    "SurgeryWarning",
    "Tokenizer",
    "TransformerEncoderLayer",
    "blend_lora",
    "disable_lora",
    "enable_lora",
    "evaluate",
    "fit",
    "generate",
    "inject_lora",
    "learned",
    "load_adapter",
    "lora_log",
    "lora_rows",
    "merge_lora",
    "merge_survival",
    "open_model",
    "plan_lora",
    "python_reference",
    "python_source",
    "read_texts",
    "redo_lora",
    "remove_lora",
    "save_adapter",
    "save_model",
    "split_by_position",
    "swap_lora",
    "tensor_hashes",
    "undo_lora",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
