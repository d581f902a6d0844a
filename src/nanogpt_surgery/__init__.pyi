"""The public names and the module of each: the one list, for type checkers and at run time."""

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

__all__: list[str]
