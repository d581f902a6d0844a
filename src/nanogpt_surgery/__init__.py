"""A GPT you can open up: the public names.

They are loaded when first used, so that importing the package, as the command line does, does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate, chat_ids
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.conversations.instructions import (
        encode_conversations,
        read_conversations,
    )
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.data.text.corpus import (
        python_reference,
        python_source,
        read_texts,
        split_by_position,
    )
    from nanogpt_surgery.data.text.mixture import Mixture
    from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
    from nanogpt_surgery.formats.gguf.writing import save_gguf
    from nanogpt_surgery.formats.model_file import open_model, save_model
    from nanogpt_surgery.formats.peft.export import save_lora_gguf, save_mlx_adapter
    from nanogpt_surgery.formats.peft.reading import load_adapter
    from nanogpt_surgery.formats.peft.writing import plan_lora, save_adapter
    from nanogpt_surgery.generation.batch import generate_batch
    from nanogpt_surgery.generation.conversation import Conversation
    from nanogpt_surgery.generation.evaluation import multiple_choice, perplexity
    from nanogpt_surgery.generation.generate import generate
    from nanogpt_surgery.generation.settings import SamplingSettings
    from nanogpt_surgery.generation.text import generate_text
    from nanogpt_surgery.history.hashing import tensor_hashes
    from nanogpt_surgery.history.model_history import lora_log, redo_lora, undo_lora
    from nanogpt_surgery.lora.checks import learned
    from nanogpt_surgery.lora.embedding import LoRAEmbedding
    from nanogpt_surgery.lora.inject import disable_lora, enable_lora, inject_lora
    from nanogpt_surgery.lora.linear import LoRALinear
    from nanogpt_surgery.lora.merging import merge_lora, merge_survival
    from nanogpt_surgery.lora.operations import blend_lora, remove_lora, swap_lora
    from nanogpt_surgery.lora.per_row import lora_rows
    from nanogpt_surgery.lora.settings import LoRASettings
    from nanogpt_surgery.model.config import FAMILIES, GPTConfig, RopeScaling
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.model.transformer_encoder_layer import KVCache, TransformerEncoderLayer
    from nanogpt_surgery.runs.run import Run
    from nanogpt_surgery.runs.training import Training
    from nanogpt_surgery.training.evaluation import evaluate
    from nanogpt_surgery.training.fit import fit
    from nanogpt_surgery.training.settings import FitSettings
    from nanogpt_surgery.training.step import Step

_HOMES = {
    "data.tokenizers.bpe_tokenizer": ("BPETokenizer",),
    "data.conversations.chat": (
        "ChatTemplate",
        "chat_ids",
    ),
    "data.conversations.instruction_dataset": ("InstructionDataset",),
    "data.conversations.instructions": (
        "encode_conversations",
        "read_conversations",
    ),
    "data.text.mixture": ("Mixture",),
    "data.tokenizers.pretrained_tokenizer": ("PretrainedTokenizer",),
    "formats.peft.export": (
        "save_lora_gguf",
        "save_mlx_adapter",
    ),
    "formats.gguf.writing": ("save_gguf",),
    "generation.batch": ("generate_batch",),
    "generation.conversation": ("Conversation",),
    "generation.evaluation": (
        "multiple_choice",
        "perplexity",
    ),
    "generation.settings": ("SamplingSettings",),
    "generation.text": ("generate_text",),
    "data.tokenizers.character_tokenizer": ("CharacterTokenizer",),
    "data.text.corpus": ("python_reference", "python_source", "read_texts", "split_by_position"),
    "data.gpt_dataset": ("GPTDataset",),
    "data.tokenizers.tokenizer": ("Tokenizer",),
    "errors": ("SurgeryError", "SurgeryWarning"),
    "formats.peft.reading": ("load_adapter",),
    "formats.peft.writing": ("plan_lora", "save_adapter"),
    "formats.model_file": ("open_model", "save_model"),
    "generation.generate": ("generate",),
    "lora.merging": ("merge_lora", "merge_survival"),
    "history.hashing": ("tensor_hashes",),
    "lora.checks": ("learned",),
    "lora.embedding": ("LoRAEmbedding",),
    "lora.linear": ("LoRALinear",),
    "lora.inject": ("disable_lora", "enable_lora", "inject_lora"),
    "lora.per_row": ("lora_rows",),
    "lora.operations": (
        "blend_lora",
        "remove_lora",
        "swap_lora",
    ),
    "lora.settings": ("LoRASettings",),
    "history.model_history": ("lora_log", "redo_lora", "undo_lora"),
    "model.config": ("FAMILIES", "GPTConfig", "RopeScaling"),
    "model.simple_gpt": ("SimpleGPT",),
    "model.transformer_encoder_layer": ("KVCache", "TransformerEncoderLayer"),
    "runs.run": ("Run",),
    "runs.training": ("Training",),
    "training.evaluation": ("evaluate",),
    "training.fit": ("fit",),
    "training.settings": ("FitSettings",),
    "training.step": ("Step",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FAMILIES",
    "BPETokenizer",
    "CharacterTokenizer",
    "ChatTemplate",
    "Conversation",
    "FitSettings",
    "GPTConfig",
    "GPTDataset",
    "InstructionDataset",
    "KVCache",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASettings",
    "Mixture",
    "PretrainedTokenizer",
    "RopeScaling",
    "Run",
    "SamplingSettings",
    "SimpleGPT",
    "Step",
    "SurgeryError",
    "SurgeryWarning",
    "Tokenizer",
    "Training",
    "TransformerEncoderLayer",
    "blend_lora",
    "chat_ids",
    "disable_lora",
    "enable_lora",
    "encode_conversations",
    "evaluate",
    "fit",
    "generate",
    "generate_batch",
    "generate_text",
    "inject_lora",
    "learned",
    "load_adapter",
    "lora_log",
    "lora_rows",
    "merge_lora",
    "merge_survival",
    "multiple_choice",
    "open_model",
    "perplexity",
    "plan_lora",
    "python_reference",
    "python_source",
    "read_conversations",
    "read_texts",
    "redo_lora",
    "remove_lora",
    "save_adapter",
    "save_gguf",
    "save_lora_gguf",
    "save_mlx_adapter",
    "save_model",
    "split_by_position",
    "swap_lora",
    "tensor_hashes",
    "undo_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
