"""A GPT you can open up: the public names.

They are loaded when first used, so that importing the package, as the command line does, does not
load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate as ChatTemplate
    from nanogpt_surgery.data.conversations.chat import chat_ids as chat_ids
    from nanogpt_surgery.data.conversations.instruction_dataset import (
        InstructionDataset as InstructionDataset,
    )
    from nanogpt_surgery.data.conversations.instructions import (
        encode_conversations as encode_conversations,
    )
    from nanogpt_surgery.data.conversations.instructions import (
        read_conversations as read_conversations,
    )
    from nanogpt_surgery.data.gpt_dataset import GPTDataset as GPTDataset
    from nanogpt_surgery.data.text.corpus import python_reference as python_reference
    from nanogpt_surgery.data.text.corpus import python_source as python_source
    from nanogpt_surgery.data.text.corpus import read_texts as read_texts
    from nanogpt_surgery.data.text.corpus import split_by_position as split_by_position
    from nanogpt_surgery.data.text.mixture import Mixture as Mixture
    from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer as BPETokenizer
    from nanogpt_surgery.data.tokenizers.character_tokenizer import (
        CharacterTokenizer as CharacterTokenizer,
    )
    from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import (
        PretrainedTokenizer as PretrainedTokenizer,
    )
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer as Tokenizer
    from nanogpt_surgery.errors import SurgeryError as SurgeryError
    from nanogpt_surgery.errors import SurgeryWarning as SurgeryWarning
    from nanogpt_surgery.formats.gguf.writing import save_gguf as save_gguf
    from nanogpt_surgery.formats.model_file import open_model as open_model
    from nanogpt_surgery.formats.model_file import save_model as save_model
    from nanogpt_surgery.formats.peft.export import save_lora_gguf as save_lora_gguf
    from nanogpt_surgery.formats.peft.export import save_mlx_adapter as save_mlx_adapter
    from nanogpt_surgery.formats.peft.reading import load_adapter as load_adapter
    from nanogpt_surgery.formats.peft.vllm import save_vllm_adapter as save_vllm_adapter
    from nanogpt_surgery.formats.peft.writing import plan_lora as plan_lora
    from nanogpt_surgery.formats.peft.writing import save_adapter as save_adapter
    from nanogpt_surgery.generation.batch import generate_batch as generate_batch
    from nanogpt_surgery.generation.conversation import Conversation as Conversation
    from nanogpt_surgery.generation.evaluation import multiple_choice as multiple_choice
    from nanogpt_surgery.generation.evaluation import perplexity as perplexity
    from nanogpt_surgery.generation.generate import generate as generate
    from nanogpt_surgery.generation.settings import SamplingSettings as SamplingSettings
    from nanogpt_surgery.generation.speculative import DraftModel as DraftModel
    from nanogpt_surgery.generation.speculative import PromptLookup as PromptLookup
    from nanogpt_surgery.generation.speculative import generate_speculative as generate_speculative
    from nanogpt_surgery.generation.text import generate_text as generate_text
    from nanogpt_surgery.history.model_history import lora_log as lora_log
    from nanogpt_surgery.history.model_history import redo_lora as redo_lora
    from nanogpt_surgery.history.model_history import tensor_hashes as tensor_hashes
    from nanogpt_surgery.history.model_history import undo_lora as undo_lora
    from nanogpt_surgery.lora.embedding import LoRAEmbedding as LoRAEmbedding
    from nanogpt_surgery.lora.inject import inject_lora as inject_lora
    from nanogpt_surgery.lora.linear import LoRALinear as LoRALinear
    from nanogpt_surgery.lora.merging import merge_lora as merge_lora
    from nanogpt_surgery.lora.merging import merge_survival as merge_survival
    from nanogpt_surgery.lora.operations import blend_lora as blend_lora
    from nanogpt_surgery.lora.operations import disable_lora as disable_lora
    from nanogpt_surgery.lora.operations import enable_lora as enable_lora
    from nanogpt_surgery.lora.operations import remove_lora as remove_lora
    from nanogpt_surgery.lora.operations import swap_lora as swap_lora
    from nanogpt_surgery.lora.per_row import lora_rows as lora_rows
    from nanogpt_surgery.lora.settings import LoRASettings as LoRASettings
    from nanogpt_surgery.lora.several import learned as learned
    from nanogpt_surgery.model.config import FAMILIES as FAMILIES
    from nanogpt_surgery.model.config import GPTConfig as GPTConfig
    from nanogpt_surgery.model.kv_cache import KVCache as KVCache
    from nanogpt_surgery.model.rope_scaling import RopeScaling as RopeScaling
    from nanogpt_surgery.model.simple_gpt import SimpleGPT as SimpleGPT
    from nanogpt_surgery.model.transformer_encoder_layer import (
        TransformerEncoderLayer as TransformerEncoderLayer,
    )
    from nanogpt_surgery.runs.run import Run as Run
    from nanogpt_surgery.runs.training import Training as Training
    from nanogpt_surgery.training.evaluation import evaluate as evaluate
    from nanogpt_surgery.training.fit import fit as fit
    from nanogpt_surgery.training.settings import FitSettings as FitSettings
    from nanogpt_surgery.training.step import Step as Step

_HOMES = {
    "data.conversations.chat": "ChatTemplate chat_ids",
    "data.conversations.instruction_dataset": "InstructionDataset",
    "data.conversations.instructions": "encode_conversations read_conversations",
    "data.gpt_dataset": "GPTDataset",
    "data.text.corpus": "python_reference python_source read_texts split_by_position",
    "data.text.mixture": "Mixture",
    "data.tokenizers.bpe_tokenizer": "BPETokenizer",
    "data.tokenizers.character_tokenizer": "CharacterTokenizer",
    "data.tokenizers.pretrained_tokenizer": "PretrainedTokenizer",
    "data.tokenizers.tokenizer": "Tokenizer",
    "errors": "SurgeryError SurgeryWarning",
    "formats.gguf.writing": "save_gguf",
    "formats.model_file": "open_model save_model",
    "formats.peft.export": "save_lora_gguf save_mlx_adapter",
    "formats.peft.reading": "load_adapter",
    "formats.peft.vllm": "save_vllm_adapter",
    "formats.peft.writing": "plan_lora save_adapter",
    "generation.batch": "generate_batch",
    "generation.conversation": "Conversation",
    "generation.evaluation": "multiple_choice perplexity",
    "generation.generate": "generate",
    "generation.settings": "SamplingSettings",
    "generation.speculative": "DraftModel PromptLookup generate_speculative",
    "generation.text": "generate_text",
    "history.model_history": "lora_log redo_lora tensor_hashes undo_lora",
    "lora.embedding": "LoRAEmbedding",
    "lora.inject": "inject_lora",
    "lora.linear": "LoRALinear",
    "lora.merging": "merge_lora merge_survival",
    "lora.operations": "blend_lora disable_lora enable_lora remove_lora swap_lora",
    "lora.per_row": "lora_rows",
    "lora.settings": "LoRASettings",
    "lora.several": "learned",
    "model.config": "FAMILIES GPTConfig",
    "model.kv_cache": "KVCache",
    "model.rope_scaling": "RopeScaling",
    "model.simple_gpt": "SimpleGPT",
    "model.transformer_encoder_layer": "TransformerEncoderLayer",
    "runs.run": "Run",
    "runs.training": "Training",
    "training.evaluation": "evaluate",
    "training.fit": "fit",
    "training.settings": "FitSettings",
    "training.step": "Step",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
