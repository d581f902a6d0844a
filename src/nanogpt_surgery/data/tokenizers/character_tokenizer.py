"""A tokenizer whose tokens are the characters of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.character_file import characters_of, tokenizer_json
from nanogpt_surgery.errors import SurgeryError


class CharacterTokenizer:
    """Built from the unique characters of a text, in the order of their code points.

    Args:
        text: its characters are the vocabulary; how often each comes does not matter.

    Attributes:
        character_to_id: the table by which `encode` looks up.
        id_to_character: the table by which `decode` looks up.
        chat_template: in Jinja, where the model was trained on conversations.

    Raises:
        SurgeryError: the text is empty.
    """

    chat_template: str | None = None

    @check_arguments
    def __init__(self, text: str):
        if not text:
            raise SurgeryError(
                "a CharacterTokenizer needs at least one character; the text is empty"
            )
        self._set_characters(sorted(set(text)))

    @classmethod
    def from_characters(cls, characters: Iterable[str]) -> CharacterTokenizer:
        """Returns a tokenizer whose id i is the i-th of these characters."""
        tokenizer = cls.__new__(cls)
        tokenizer._set_characters(list(characters))
        return tokenizer

    def _set_characters(self, characters: list[str]) -> None:
        assert 0 < len(set(characters)) == len(characters), "some characters, and each once"
        self.id_to_character = dict(enumerate(characters))
        self.character_to_id = {character: i for i, character in self.id_to_character.items()}

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.id_to_character)

    def encode(self, text: str) -> list[int]:
        """Returns the id of each character.

        Raises:
            SurgeryError: a character is not in the vocabulary.
        """
        try:
            return [self.character_to_id[character] for character in text]
        except KeyError as unknown:
            raise self._unknown(text, text.index(unknown.args[0])) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids.

        Raises:
            SurgeryError: an id is outside the vocabulary.
        """
        try:
            return "".join([self.id_to_character[int(i)] for i in ids])
        except KeyError as unknown:
            raise SurgeryError(
                f"id {unknown.args[0]} is outside the vocabulary of {self.vocab_size} characters"
            ) from None

    @cached_property
    def _id_of_code_point(self) -> NDArray[np.int32]:
        """The same table as an array by code point: −1 where there is no id.

        Its last entry, one beyond the largest code point, stands for all that are larger.
        """
        code_points = [ord(character) for character in self.character_to_id]
        table = np.full(max(code_points) + 2, -1, dtype=np.int32)
        table[code_points] = np.arange(len(code_points))
        return table

    def encode_to_numpy(self, text: str) -> NDArray[np.int32]:
        """Returns the ids of `encode` as an array (N,); much faster for a large text."""
        # A Python string may hold half of a surrogate pair, which has a code point too.
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        table = self._id_of_code_point
        ids = table[np.minimum(code_points, len(table) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            raise self._unknown(text, int(unknown[0]))
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Returns the id of each character, and its position in the text."""
        return self.encode(text), list(range(len(text)))

    def check(self, text: str, where: str) -> None:
        """Raises `SurgeryError`, which says `where` the text is from, if a character is unknown."""
        if unknown := set(text) - self.character_to_id.keys():
            raise self._unknown(text, min(map(text.index, unknown)), f"{where}: ")

    def _unknown(self, text: str, position: int, where: str = "") -> SurgeryError:
        character = text[position]
        line = text.count("\n", 0, position) + 1
        return SurgeryError(
            f"{where}the character {character!r} (U+{ord(character):04X}) at position {position}, "
            f"line {line}, is not among the {self.vocab_size} that this tokenizer was built from",
            "remove it, or build the tokenizer from a text that contains it and train anew",
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of a `tokenizer.json` that the `tokenizers` package reads."""
        return tokenizer_json(self.character_to_id)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @classmethod
    def from_json(cls, contents: dict[str, Any]) -> CharacterTokenizer:
        """Returns the tokenizer of a `tokenizer.json` that `save` wrote.

        Raises:
            SurgeryError: it is another kind of tokenizer, or damaged.
        """
        return cls.from_characters(characters_of(contents))
