"""The tokenizer of a pretrained model: any `tokenizer.json`, read by the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Encoder
from tokenizers.models import WordLevel

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer_limits import (
    check_limits,
    check_speed,
    expressions,
)
from nanogpt_surgery.errors import SurgeryError, foreign_file

_LARGEST_ID = 2**31 - 1
_WHERE = "tokenizer.json"


class PretrainedTokenizer:
    """A `tokenizer.json`, with what its model's other files say about its tokens.

    Special tokens that are written out in a text become themselves, as in transformers; none is
    added unless `encode_prompt`, or `encode` with `add_special_tokens`, is asked.

    Args:
        contents: a parsed `tokenizer.json`.
        bos_id: the token that begins a text; None asks `special_tokens`, then the `tokenizer.json`.
        stop_ids: tokens that end a text or a turn, the usual one first.
        add_bos: whether a prompt begins with `bos_id`; None asks the `tokenizer.json`.
        chat_template: the model's own, in Jinja.
        special_tokens: the tokens that have a role, by its name in transformers ("bos_token",
            "pad_token", …); None: those of `bos_id` and the first of `stop_ids`.
        extra_special_tokens: special tokens without a role.
        added_tokens: tokens that other files add to those of the `tokenizer.json`.
        settings: what else a `tokenizer_config.json` says (padding_side, model_max_length, …).
        chat_templates: all of the model's templates by name, where it has several.

    Attributes:
        prefix_ids: what the `tokenizer.json` puts before a text.
        suffix_ids: what it puts behind a text.

    Raises:
        SurgeryError: the contents are not a tokenizer's.
    """

    @check_arguments
    def __init__(
        self,
        contents: dict[str, Any],
        *,
        bos_id: int | None = None,
        stop_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str | AddedToken] | None = None,
        extra_special_tokens: Sequence[str | AddedToken] = (),
        added_tokens: Sequence[AddedToken] = (),
        settings: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        contents = given = contents | {"truncation": None, "padding": None}
        named = dict(special_tokens or {})
        with foreign_file(_WHERE):
            check_limits(contents)
            self._has_expressions = bool(expressions(contents))
            self._written = _bytes(contents)
            self._encoder = Encoder.from_buffer(self._written)
            tokens = _missing(self._encoder, added_tokens, named, extra_special_tokens)
            if tokens:
                self._encoder.add_tokens(tokens)
                contents = contents | {"added_tokens": _added_tokens(self._encoder)}
            self.prefix_ids, self.suffix_ids = added_around(self._encoder)
            self._encoder.post_processor = None  # it would pass over blanks in offsets of tokens
        self.special_tokens = {name: str(token) for name, token in named.items()}
        self.extra_special_tokens = [str(token) for token in extra_special_tokens]
        self.chat_template = chat_template
        self.chat_templates = dict(chat_templates or {})
        self.settings = dict(settings or {})
        self._set_ends(bos_id, stop_ids, special_tokens is None)
        if add_bos is not None and add_bos != bool(self.prefix_ids):
            contents = self._set_prefix(contents, add_bos)
        self.add_bos = bool(self.prefix_ids)
        if contents is not given:
            self._written = _bytes(contents)

    def _set_ends(self, bos_id: int | None, stop_ids: Sequence[int], name_them: bool) -> None:
        bos = self._id_of_role("bos_token") if bos_id is None else bos_id
        if bos is None and len(self.prefix_ids) == 1:
            bos = self.prefix_ids[0]
        eos = self._id_of_role("eos_token")
        ends = [*([] if eos is None else [eos]), *stop_ids]
        self.bos_id, self.eos_id = bos, next(iter(ends), None)
        self.stop_ids = frozenset(ends)
        roles = {"bos_token": bos, "eos_token": self.eos_id} if name_them else {}
        tokens = {role: self.token_of(index) for role, index in roles.items()}
        self.special_tokens |= {role: token for role, token in tokens.items() if token}

    def _set_prefix(self, contents: dict[str, Any], add_bos: bool) -> dict[str, Any]:
        """The contents that put BOS before a text, or nothing."""
        if not add_bos or self.bos_id is None:
            self.prefix_ids, self.suffix_ids = [], []
            return contents | {"post_processor": None}
        self.prefix_ids = [self.bos_id]
        begin = begin_with(self.token_of(self.bos_id), self.bos_id)
        there = contents.get("post_processor")
        both = {"type": "Sequence", "processors": [there, begin]} if there else begin
        return contents | {"post_processor": both}

    def _id_of_role(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return self.id_of(token) if token else None

    @property
    def pad_id(self) -> int | None:
        """The token that fills up rows of a batch, if it is named."""
        return self._id_of_role("pad_token")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def tokens_from(self, size: int) -> dict[int, str]:
        """The tokens whose ids a model of `size` rows does not have."""
        vocab = self._encoder.get_vocab(with_added_tokens=True)
        return {i: token for token, i in sorted(vocab.items(), key=lambda x: x[1]) if i >= size}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text, with what the `tokenizer.json` puts around it if asked."""
        ids = self._encoding(text, self._encoder.encode_batch_fast).ids
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_to_numpy(self, text: str) -> NDArray[np.int32]:
        """The same ids as an int32 array (N,)."""
        ids = self._encoding(text, self._encoder.encode_batch_fast).ids
        return np.asarray(ids, dtype=np.int32)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """The same ids, and for each the position of its first character in the text."""
        found = self._encoding(text, self._encoder.encode_batch)
        return found.ids, [start for start, _ in found.offsets]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that begins a context: after what the model expects before it (BOS).

        A text that begins with it already gets no second one. What the `tokenizer.json` puts behind
        a text is left out: the model is to continue.
        """
        ids = self.encode(text)
        begun = ids[: len(self.prefix_ids)] == self.prefix_ids
        return ids if begun else [*self.prefix_ids, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included.

        An id that no token has, as in a vocabulary padded to a round number, has no text.

        Raises:
            SurgeryError: an id is negative.
        """
        plain = [int(i) for i in ids]
        if any(i < 0 for i in plain):
            raise SurgeryError(f"id {min(plain)} is negative")
        known = [i for i in plain if i <= _LARGEST_ID]
        with foreign_file(_WHERE, "decoding"):
            return self._encoder.decode(known, skip_special_tokens=False)

    def token_of(self, index: int | None) -> str | None:
        """How the vocabulary writes an id, if it has it."""
        return None if index is None else self._encoder.id_to_token(index)

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, if it has it."""
        return self._encoder.token_to_id(token)

    def to_json(self) -> dict[str, Any]:
        """The contents of a `tokenizer.json`."""
        return json.loads(self._written)

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")

    def _encoding(self, text: str, encode: Callable[..., list[Encoding]]) -> Encoding:
        _check_unicode(text)
        with foreign_file(_WHERE, "encoding a text"):
            if self._has_expressions:
                check_speed(self._encoder.encode, text)
            return encode([text], add_special_tokens=False)[0]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SurgeryError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at "
            f"position {error.start}, which no encoding of Unicode can hold"
        ) from None


def _bytes(contents: dict[str, Any]) -> bytes:
    """A `tokenizer.json`, in which form it takes a tenth of the memory that its parts take.

    In ASCII: one character beyond U+FFFF makes all of a str take four bytes each.
    """
    return json.dumps(contents).encode()


def _missing(
    encoder: Encoder,
    added: Sequence[AddedToken],
    named: Mapping[str, str | AddedToken],
    extra: Sequence[str | AddedToken],
) -> list[AddedToken]:
    """The tokens that are not among an encoder's added ones, in transformers' order."""
    there = encoder.get_added_tokens_decoder().values()
    flags = {repr(token) for token in there}
    missing = [token for token in added if repr(token) not in flags]
    known = {token.content for token in [*there, *missing]}
    for token in [*named.values(), *extra]:
        if str(token) not in known:
            known.add(str(token))
            missing.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    roles = {str(token) for token in named.values()}
    for token in missing:
        token.special = token.special or token.content in roles
    return missing


def _added_tokens(encoder: Encoder) -> list[dict[str, Any]]:
    """The added tokens of an encoder, as a `tokenizer.json` lists them."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        {"id": i} | {flag: getattr(token, flag) for flag in flags}
        for i, token in sorted(encoder.get_added_tokens_decoder().items())
    ]


def added_around(encoder: Encoder) -> tuple[list[int], list[int]]:
    """The ids that an encoder's post-processor puts before a text, and those it puts behind it.

    Raises:
        SurgeryError: it writes the text another number of times than once.
    """
    text = Encoder(WordLevel({"": 0}, unk_token="")).encode("one token")
    around = encoder.post_process(text)
    places = [i for i, added in enumerate(around.special_tokens_mask) if not added]
    if len(places) != 1:
        raise SurgeryError(
            f"the tokenizer.json's post_processor writes a text {len(places)} times; it must be "
            "once"
        )
    return around.ids[: places[0]], around.ids[places[0] + 1 :]


def begin_with(token: str | None, index: int) -> dict[str, Any]:
    """A post-processor that puts a token (BOS) before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
