"""Tokenizers with more tokens, or without those that some texts do not use.

| kind                                  | a token more          | without unused ones          |
|---------------------------------------|-----------------------|------------------------------|
| `CharacterTokenizer`                  | a character           | any; a text with one of them |
|                                       |                       | is refused from then on      |
| `BPETokenizer`                        | an added token, as a  | all but the 256 bytes        |
|                                       | `PretrainedTokenizer` |                              |
| `PretrainedTokenizer`, BPE with bytes | an added token        | all but the 256 bytes        |
| `PretrainedTokenizer`, of other kinds | an added token        | refused: what is dropped     |
|                                       |                       | would be unknown             |

A merge that a text needs on the way to a token stays with its parts, so that the texts are encoded
as before. Special tokens stay, and added ones that a chat template writes. What stays keeps its
order, so ids only move down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from tokenizers import AddedToken

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer, pairs_of
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.token_text import CHARACTER_OF_BYTE
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, quoted

Resizable: TypeAlias = CharacterTokenizer | BPETokenizer | PretrainedTokenizer
_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]  # how SentencePiece writes single bytes


def checked_kind(tokenizer: Tokenizer) -> Resizable:
    """Returns a tokenizer of a kind whose vocabulary can be changed.

    Raises:
        SurgeryError: it is of another.
    """
    if isinstance(tokenizer, CharacterTokenizer | BPETokenizer | PretrainedTokenizer):
        return tokenizer
    raise SurgeryError(
        f"the vocabulary of a {type(tokenizer).__name__} cannot be changed",
        "use a CharacterTokenizer, BPETokenizer or PretrainedTokenizer",
    )


def ids_of_tokens(contents: dict[str, Any]) -> dict[str, int]:
    """Returns the id of each token of a `tokenizer.json`, the added ones among them."""
    model, added = contents.get("model"), contents.get("added_tokens")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else {}
    if isinstance(vocab, list):  # a unigram model's: token and score
        vocab = {row[0]: i for i, row in enumerate(vocab)}
    return dict(vocab or {}) | {token["content"]: token["id"] for token in added or []}


@check_arguments
def with_added_tokens(
    tokenizer: Tokenizer, tokens: Sequence[str], special: bool = False
) -> Resizable:
    """Returns a tokenizer that has more tokens, behind those that there are.

    Args:
        tokenizer: stays as it is.
        tokens: as a text writes them; wherever one stands in a text, it becomes one id.
        special: whether they are control tokens, which transformers leaves out of a decoded text
            where it is asked to.

    Raises:
        SurgeryError: a token is there already, is empty, or comes twice, or the tokenizer is of a
            kind that cannot have it.
    """
    tokenizer = checked_kind(tokenizer)
    there = ids_of_tokens(tokenizer.to_json())
    for place, token in enumerate(tokens):
        if why := _refused(tokenizer, there, token, tokens[:place]):
            raise SurgeryError(f"the token {quoted(token)} {why}")
    if isinstance(tokenizer, CharacterTokenizer):
        return _with_characters(tokenizer, tokens)
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    made = _rebuilt(tokenizer, tokenizer.to_json(), {i: i for i in there.values()}, added)
    _check_kept(made, there, {i: i for i in there.values()})
    for token in tokens:
        if made.encode(token) != [made.id_of(token)]:
            raise SurgeryError(
                f"the token {quoted(token)} would not become one id: another added token stands in "
                "it"
            )
    return made


def _refused(
    tokenizer: Resizable, there: Mapping[str, int], token: str, before: Sequence[str]
) -> str:
    """Returns why a token cannot be added, or ""."""
    if not token or token in before:
        return "is named twice" if token else "is empty"
    if token in there:
        return f"is in the vocabulary, as {there[token]}"
    if isinstance(tokenizer, CharacterTokenizer):
        return ""
    if any("\ud800" <= character <= "\udfff" for character in token):
        return "has half of a surrogate pair, which is no character"
    ids = tokenizer.encode(token)  # a vocabulary may write it otherwise: Ġthe
    alone = len(ids) == 1 and tokenizer.decode(ids) == token
    return f"is one token already, {ids[0]}" if alone else ""


def _with_characters(tokenizer: CharacterTokenizer, tokens: Sequence[str]) -> CharacterTokenizer:
    longer = next((token for token in tokens if len(token) != 1), None)
    if longer is not None:
        raise SurgeryError(
            f"{quoted(longer)} has {len(longer)} characters; each token of this model is one",
        )
    made = CharacterTokenizer.from_characters([*tokenizer.id_to_character.values(), *tokens])
    made.chat_template = tokenizer.chat_template
    return made


@check_arguments
def without_unused_tokens(
    tokenizer: Tokenizer, texts: str | Iterable[str]
) -> tuple[Resizable, list[int]]:
    """Returns a tokenizer without the tokens that some texts do not use, and the ids that stay.

    Args:
        tokenizer: stays as it is.
        texts: one text, or several; they are encoded as before, but for the numbers of the ids.

    Returns:
        The tokenizer, and for each of its ids, in order, what it was before.

    Raises:
        SurgeryError: the tokenizer is of a kind whose tokens cannot be dropped, or the texts would
            be encoded otherwise.
    """
    tokenizer = checked_kind(tokenizer)
    texts = [texts] if isinstance(texts, str) else list(texts)
    used = {int(i) for text in texts for i in tokenizer.encode(text)}
    if not used:
        raise SurgeryError("the texts are empty, so every token would be unused")
    made: Resizable
    if isinstance(tokenizer, CharacterTokenizer):
        kept = sorted(used)
        made = CharacterTokenizer.from_characters(tokenizer.id_to_character[i] for i in kept)
        made.chat_template = tokenizer.chat_template
    else:
        contents = tokenizer.to_json()
        kept = sorted(_needed(tokenizer, contents, used))
        moved = {old: new for new, old in enumerate(kept)}
        made = _rebuilt(tokenizer, _reduced(contents, moved), moved)
        there = {t: i for t, i in ids_of_tokens(contents).items() if i in moved}
        _check_kept(made, there, moved)
    for text in texts:
        if [kept[i] for i in made.encode(text)] != list(tokenizer.encode(text)):
            raise SurgeryError(
                "without the tokens that the texts do not use they are encoded otherwise"
            )
    return made, kept


def _needed(
    tokenizer: BPETokenizer | PretrainedTokenizer, contents: dict[str, Any], used: set[int]
) -> set[int]:
    """Returns the ids that must stay: of what is used, its parts, bytes, and special tokens."""
    vocab: dict[str, int] = contents["model"].get("vocab")
    alphabet = _alphabet(contents)
    names = {i: token for token, i in vocab.items()}
    parts: dict[str, list[str]] = {}
    for left, right in pairs_of(contents["model"]["merges"]):
        parts.setdefault(left + right, []).extend((left, right))
    unknown = contents["model"].get("unk_token")
    waiting = [names[i] for i in used if i in names]
    waiting += [*alphabet, *([unknown] if unknown in vocab else [])]
    found: set[str] = set()
    while waiting:
        token = waiting.pop()
        if token not in found:
            found.add(token)
            waiting += parts.get(token, [])
    templates = _templates(tokenizer)
    kept = {vocab[token] for token in found} | _with_a_role(tokenizer) | used
    kept |= set(_ids_around(contents.get("post_processor")))
    for token in contents["added_tokens"]:
        if token["special"] or any(token["content"] in template for template in templates):
            kept.add(token["id"])
    return kept


def _with_a_role(tokenizer: BPETokenizer | PretrainedTokenizer) -> set[int]:
    """Returns the ids that end a text, begin it, fill it up, and so on."""
    if isinstance(tokenizer, BPETokenizer):
        return {*tokenizer.stop_ids}
    named = [tokenizer.id_of(token) for token in tokenizer.special_tokens.values()]
    ids = [tokenizer.bos_id, *tokenizer.stop_ids, *named]
    return {i for i in ids if tokenizer.token_of(i) is not None and i is not None}


def _ids_around(step: Any) -> Iterator[int]:
    """Yields the ids that a post-processor puts around a text."""
    if isinstance(step, dict):
        for key in ("sep", "cls"):  # BERT's and RoBERTa's
            yield from step.get(key, [])[1:]
        for token in (step.get("special_tokens") or {}).values():
            yield from token["ids"]
        for one in step.get("processors", []):
            yield from _ids_around(one)


def _templates(tokenizer: Tokenizer) -> list[str]:
    one = getattr(tokenizer, "chat_template", None)
    several: Mapping[str, str] = getattr(tokenizer, "chat_templates", {})
    return [template for template in (one, *several.values()) if template]


def _alphabet(contents: dict[str, Any]) -> list[str]:
    """Returns the tokens with which any text can be written byte by byte that could be before.

    Raises:
        SurgeryError: the tokenizer has none, or merges in a way that is not followed here.
    """
    model = contents["model"]
    kind, vocab = model.get("type"), model.get("vocab")
    why = ""
    if kind != "BPE" or not isinstance(vocab, dict):
        why = f"it is a {quoted(kind)}, not a BPE"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        why = "its merges mark the beginnings or ends of words"
    elif _is_byte_level(contents):  # a byte that it has not was unknown before
        return [token for token in CHARACTER_OF_BYTE.values() if token in vocab]
    elif model.get("byte_fallback") and vocab.keys() >= set(_FALLBACK):
        return _FALLBACK
    why = why or "its vocabulary has no token for each byte"
    raise SurgeryError(
        f"no token of this tokenizer can be dropped: {why}, so a text with what is dropped could "
        "be written only as unknown"
    )


def _is_byte_level(contents: dict[str, Any]) -> bool:
    step = contents.get("pre_tokenizer") or {}
    return any(one.get("type") == "ByteLevel" for one in (step, *step.get("pretokenizers", [])))


def _reduced(contents: dict[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    """Returns a `tokenizer.json` with the tokens that stay, under their new ids."""
    model = contents["model"]
    vocab = {token: moved[i] for token, i in model["vocab"].items() if i in moved}
    pairs = pairs_of(model["merges"])
    kept = [list(pair) for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    added = [
        token | {"id": moved[token["id"]]}
        for token in contents["added_tokens"]
        if token["id"] in moved
    ]
    return contents | {
        "model": model | {"vocab": vocab, "merges": kept},
        "added_tokens": added,
        "post_processor": _renumbered(contents.get("post_processor"), moved),
    }


def _renumbered(step: Any, moved: Mapping[int, int]) -> Any:
    """Returns a post-processor that puts the same tokens around a text, under their new ids."""
    if not isinstance(step, dict):
        return step
    new = dict(step)
    for key in ("sep", "cls"):
        if key in step:
            new[key] = [step[key][0], moved[step[key][1]]]
    if step.get("special_tokens"):
        new["special_tokens"] = {
            name: token | {"ids": [moved[i] for i in token["ids"]]}
            for name, token in step["special_tokens"].items()
        }
    if "processors" in step:
        new["processors"] = [_renumbered(one, moved) for one in step["processors"]]
    return new


def _rebuilt(
    tokenizer: BPETokenizer | PretrainedTokenizer,
    contents: dict[str, Any],
    moved: Mapping[int, int],
    added: Sequence[AddedToken] = (),
) -> Any:
    """Returns a tokenizer of other contents that is in all else as one was before."""
    if isinstance(tokenizer, BPETokenizer):
        if not added:
            return BPETokenizer.from_json(contents)
        return PretrainedTokenizer(contents, stop_ids=[*tokenizer.stop_ids], added_tokens=added)
    ends = sorted(tokenizer.stop_ids, key=lambda i: (i != tokenizer.eos_id, i))
    return PretrainedTokenizer(
        contents,
        bos_id=None if tokenizer.bos_id is None else moved[tokenizer.bos_id],
        stop_ids=[moved[i] for i in ends],
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        extra_special_tokens=tokenizer.extra_special_tokens,
        added_tokens=added,
        settings=tokenizer.settings,
        chat_templates=tokenizer.chat_templates,
    )


def _check_kept(made: Resizable, there: Mapping[str, int], moved: Mapping[int, int]) -> None:
    """Raises `SurgeryError` unless each token that stays has the id that it is to have."""
    now = ids_of_tokens(made.to_json())
    wrong = [token for token, i in there.items() if now.get(token) != moved[i]]
    if wrong:
        raise SurgeryError(
            f"the token {quoted(wrong[0])} would have the id {now.get(wrong[0])}, not "
            f"{moved[there[wrong[0]]]}"
        )
