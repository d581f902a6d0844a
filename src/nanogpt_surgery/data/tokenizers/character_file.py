"""A vocabulary of characters as a `tokenizer.json`, which the `tokenizers` package reads too."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.errors import SurgeryError


def tokenizer_json(character_to_id: dict[str, int]) -> dict[str, Any]:
    """Returns the contents of the file: a token for each character, whatever it is."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},  # joined again without spaces
        "model": {"type": "WordLevel", "vocab": character_to_id, "unk_token": ""},
    }


def characters_of(contents: dict[str, Any]) -> list[str]:
    """Returns the characters in the order of their ids, from the contents of such a file.

    Raises:
        SurgeryError: it is another kind of tokenizer, or damaged.
    """
    model = contents.get("model") if isinstance(contents, dict) else None
    found = model if isinstance(model, dict) and model.get("type") == "WordLevel" else {}
    vocab = found.get("vocab")
    if not vocab or not isinstance(vocab, dict) or any(len(token) != 1 for token in vocab):
        raise SurgeryError("this tokenizer.json is not a character tokenizer's")
    numbered = all(isinstance(i, int) for i in vocab.values())
    if not numbered or sorted(vocab.values()) != list(range(len(vocab))):
        raise SurgeryError("the ids in this tokenizer.json are not 0, 1, 2, …")
    return sorted(vocab, key=vocab.__getitem__)
