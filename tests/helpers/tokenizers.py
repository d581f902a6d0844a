"""Small tokenizers of every kind, trained on the spot."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

TEXT = (
    "The quick brown fox — naïve café, 日本語 😀 jumps over 12345 lazy dogs.\n\tIt's theirs!\n" * 3
)


def byte_level(vocab_size: int = 300) -> dict:
    """Byte-level BPE with ChatML's tokens, as SmolLM's is built."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    encoder.train_from_iterator([TEXT], trainer)
    return json.loads(encoder.to_str())


def sentencepiece_like(vocab_size: int = 340) -> dict:
    """BPE on characters with byte fallback and a BOS, as Llama 2's is built."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    encoder = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    encoder.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        limit_alphabet=40,
    )
    encoder.train_from_iterator([TEXT], trainer)
    encoder.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    contents = json.loads(encoder.to_str())
    kept = [token for token in contents["added_tokens"] if token["content"] not in bytes_]
    return contents | {"added_tokens": kept}


def unigram() -> dict:
    """A unigram model with Metaspace, as T5's and ALBERT's are built."""
    encoder = Tokenizer(models.Unigram())
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False, unk_token="<unk>")
    trainer.special_tokens = ["<unk>"]
    encoder.train_from_iterator([TEXT], trainer)
    return json.loads(encoder.to_str())


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like, "unigram": unigram}
