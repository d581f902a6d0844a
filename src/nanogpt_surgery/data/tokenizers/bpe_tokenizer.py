"""Byte-level byte-pair encoding: trained here, or read from GPT-2's vocabulary files.

A text is cut into words by a pattern, a word into its bytes, and neighbouring parts are merged in
the order in which training found the merges (arXiv:1508.07909). Every text can be encoded, since
every byte is a token. `tiktoken` does the encoding; the `tokenizers` package does the training and
reads the same `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer as Encoder
from tokenizers.trainers import BpeTrainer

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.token_text import CHARACTER_OF_BYTE, read_bytes
from nanogpt_surgery.errors import SurgeryError, first_problems

# Contractions, then words, numbers and marks, each with one space before it, then white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
# What the pattern's engine takes for white space, in runs that it cannot go back over.
_LONG_BLANK = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{2000,}")


class BPETokenizer:
    """Byte-level BPE with GPT-2's pattern.

    Args:
        vocab: the id of each token, written in the byte alphabet; all 256 bytes among them.
        merges: pairs of tokens, the first to be merged first.
        special: the ids of special tokens, which become themselves where a text writes them out.

    Raises:
        SurgeryError: the parts contradict each other (all contradictions at once).
    """

    @check_arguments
    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special: dict[str, int] | None = None,
    ):
        self.special = dict(special or {})
        self.vocab = {token: i for token, i in vocab.items() if token not in self.special}
        self.merges = merges
        _check(self.vocab, merges, self.special)
        self._encoding = tiktoken.Encoding(
            "byte-level BPE",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={read_bytes(token): i for token, i in self.vocab.items()},
            special_tokens=self.special,
        )
        self.eos_id = self.special.get(END_OF_TEXT)
        self.stop_ids = frozenset(() if self.eos_id is None else (self.eos_id,))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns the merges that shorten these texts the most, greedily.

        Args:
            texts: one text, or several.
            vocab_size: how many tokens, the 256 bytes and `<|endoftext|>` included; fewer where the
                texts repeat too little.

        Raises:
            SurgeryError: the vocabulary is too small for the bytes.
        """
        if vocab_size < 257:
            raise SurgeryError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        # Each merge shortens the texts; the trainer makes room for all that it is asked for.
        most = 256 + 4 * sum(map(len, texts))  # bytes of a character
        trainer = BpeTrainer(
            vocab_size=min(vocab_size - 1, most),
            show_progress=False,
            initial_alphabet=list(CHARACTER_OF_BYTE.values()),
        )
        encoder = Encoder.from_str(json.dumps(_contents({}, [], {})))
        encoder.train_from_iterator(texts, trainer)
        model = json.loads(encoder.to_str())["model"]
        return cls(model["vocab"], pairs_of(model["merges"]), {END_OF_TEXT: len(model["vocab"])})

    @classmethod
    def from_files(cls, vocab: str | Path, merges: str | Path) -> BPETokenizer:
        """Reads GPT-2's two files, `vocab.json` (or `encoder.json`) and `merges.txt` (`vocab.bpe`).

        Raises:
            SurgeryError: they are not such files, or contradict each other.
        """
        try:
            ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
            lines = Path(merges).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise SurgeryError(f"cannot read {vocab} and {merges}: {error}") from error
        pairs = [line for line in lines if line and not line.startswith("#version")]
        special = {END_OF_TEXT: ids[END_OF_TEXT]} if END_OF_TEXT in ids else {}
        return cls(ids, pairs_of(pairs), special)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        if not _LONG_BLANK.search(text):
            return self._encoding.encode(text, allowed_special="all")
        return [i for part in self._parts(text) for i in part]

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """The same ids as an array (N,), without a Python object for each."""
        if not _LONG_BLANK.search(text):
            return self._encoding.encode_to_numpy(text, allowed_special="all")
        return np.concatenate([np.asarray(part, dtype=np.uint32) for part in self._parts(text)])

    def _parts(self, text: str) -> Iterator[list[int]]:
        """The ids of a text in parts; the pattern goes no further than some thousand blanks.

        Before a word, the last blank of a run belongs to the word: the rest is one piece. Before a
        special token, or at the end, the whole run is one.
        """
        place = 0
        for run in _LONG_BLANK.finditer(text):
            special = text.startswith(tuple(self.special), run.end())
            end = run.end() if run.end() == len(text) or special else run.end() - 1
            yield self._encoding.encode(text[place : run.start()], allowed_special="all")
            yield self._encoding._encode_single_piece(text[run.start() : end])
            place = end
        yield self._encoding.encode(text[place:], allowed_special="all")

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the position of its first character in the text."""
        ids = self.encode(text)
        return ids, self._encoding.decode_with_offsets(ids)[1]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            SurgeryError: an id is outside the vocabulary.
        """
        try:
            return self._encoding.decode([int(i) for i in ids])
        except (KeyError, OverflowError) as error:
            raise SurgeryError(
                f"an id is outside the vocabulary of {self.vocab_size} tokens: {error}"
            ) from None

    def token_of(self, index: int | None) -> str | None:
        """How the vocabulary writes an id, if it has it."""
        names = {i: token for token, i in (self.vocab | self.special).items()}
        return None if index is None else names.get(index)

    def to_json(self) -> dict[str, Any]:
        """The contents of a `tokenizer.json` that the `tokenizers` package reads."""
        return _contents(self.vocab, self.merges, self.special)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_json(cls, contents: dict[str, Any]) -> BPETokenizer:
        """The tokenizer of a `tokenizer.json` that `save` wrote."""
        model, added = contents["model"], contents["added_tokens"]
        special = {token["content"]: token["id"] for token in added}
        return cls(model["vocab"], pairs_of(model["merges"]), special)


def is_ours(contents: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is one that `BPETokenizer` writes."""
    model = contents.get("model")
    return (
        isinstance(model, dict)
        and set(model) == {"type", "vocab", "merges"}
        and contents.get("pre_tokenizer") == _PRE_TOKENIZER
        and contents.get("normalizer") is None
        and contents.get("post_processor") is None
    )


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": GPT2_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTE_LEVEL,
    ],
}


def _contents(
    vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int]
) -> dict[str, Any]:
    """A `tokenizer.json`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True} | flags
            for token, index in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }


def pairs_of(merges: Iterable[str | list[str]]) -> list[tuple[str, str]]:
    """The merges of a `tokenizer.json`: pairs, or the two tokens with a space between them."""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    bad = next((pair for pair in pairs if len(pair) != 2), None)
    if bad is not None:
        raise SurgeryError(f"the merge {' '.join(bad)!r} is not of two tokens")
    return [(left, right) for left, right in pairs]


def _check(vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int]) -> None:
    """Merges are applied in the order of ids by tiktoken, so they must come in that order."""
    written = set(CHARACTER_OF_BYTE.values())
    problems = [f"the byte {c!r} has no id" for c in sorted(written - vocab.keys())]
    problems += [f"{t!r} is not in the byte alphabet" for t in vocab if not set(t) <= written]
    ids = [*vocab.values(), *special.values()]
    if len(set(ids)) < len(ids):
        problems.append("two tokens have one id")
    merged = [vocab.get(left + right, -1) for left, right in merges]
    if -1 in merged:
        problems.append(f"the merge {' '.join(merges[merged.index(-1)])!r} makes no token")
    elif merged != sorted(merged):
        problems.append("the merges come in another order than the ids of what they make")
    if problems:
        raise SurgeryError(f"this is no byte-level BPE: {first_problems(problems, 8)}")
