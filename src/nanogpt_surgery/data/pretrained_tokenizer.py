"""The tokenizer of a pretrained model: any `tokenizer.json`, read by the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Encoder

from nanogpt_surgery.errors import SurgeryError


class PretrainedTokenizer:
    """What a `tokenizer.json` describes, and what its model's other files say about its ids.

    Special tokens that are written out in a text become themselves, as in transformers; none is
    added unless `encode_prompt` is asked.

    Args:
        contents: a parsed `tokenizer.json`.
        bos_id: the token that begins a text.
        stop_ids: tokens that end a text or a turn, the usual one first.
        add_bos: whether a prompt begins with `bos_id`; None asks the `tokenizer.json`.
        chat_template: the model's own, in Jinja.

    Raises:
        SurgeryError: the contents are not a tokenizer's.
    """

    def __init__(
        self,
        contents: dict[str, Any],
        *,
        bos_id: int | None = None,
        stop_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
    ):
        contents = contents | {"truncation": None, "padding": None}
        try:
            self._written = _bytes(contents)
            self._encoder = Encoder.from_buffer(self._written)
        except Exception as error:  # the package raises nothing narrower
            raise SurgeryError(f"this tokenizer.json cannot be read: {error}") from error
        begins = self._encoder.encode("").ids
        self._encoder.post_processor = None  # it would pass over blanks in the offsets of tokens
        if bos_id is None and len(begins) == 1:
            bos_id = begins[0]
        self.bos_id = bos_id
        self.eos_id = next(iter(stop_ids), None)
        self.stop_ids = frozenset(stop_ids)
        self.add_bos = bos_id is not None and (bool(begins) if add_bos is None else add_bos)
        self.chat_template = chat_template
        if self.add_bos and not begins:
            begin = {"post_processor": _begin_with(self.token_of(bos_id), bos_id)}
            self._written = _bytes(contents | begin)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._encoding(text))

    def encode_to_numpy(self, text: str) -> NDArray[np.int32]:
        """The same ids as an int32 array (N,)."""
        return np.asarray(self._encoding(text), dtype=np.int32)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the position of its first character in the text."""
        _check_unicode(text)
        found = self._encoder.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that begins a context: after `bos_id`, where the model expects it.

        A text that begins with it already gets no second one.
        """
        ids = self.encode(text)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included.

        An id that no token has, as in a vocabulary padded to a round number, has no text.

        Raises:
            SurgeryError: an id is negative.
        """
        plain = [int(i) for i in ids]
        if any(i < 0 for i in plain):
            raise SurgeryError(f"id {min(plain)} is negative")
        return self._encoder.decode(plain, skip_special_tokens=False)

    def token_of(self, index: int | None) -> str | None:
        """How the vocabulary writes an id, if it has it."""
        return None if index is None else self._encoder.id_to_token(index)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, if it has it."""
        return self._encoder.token_to_id(token)

    def to_json(self) -> dict[str, Any]:
        """The contents of a `tokenizer.json`."""
        contents: dict[str, Any] = json.loads(self._written)
        return contents

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`."""
        Path(path).write_bytes(self._written)

    def _encoding(self, text: str) -> list[int]:
        _check_unicode(text)
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SurgeryError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at "
            f"position {error.start}, which no encoding of Unicode can hold"
        ) from None


def _bytes(contents: dict[str, Any]) -> bytes:
    """A `tokenizer.json`, in which form it takes a tenth of the memory that its parts take."""
    return json.dumps(contents, ensure_ascii=False).encode()


def _begin_with(token: str | None, index: int | None) -> dict[str, Any]:
    """What makes other readers of the `tokenizer.json` put BOS before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
