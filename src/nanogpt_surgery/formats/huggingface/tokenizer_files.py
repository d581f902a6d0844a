"""The tokenizer in a model folder: `tokenizer.json` and what other files say about its ids.

| file                     | what is read                                            |
|--------------------------|---------------------------------------------------------|
| `tokenizer.json`         | the tokenizer itself                                    |
| `vocab.json`, `merges.txt` | GPT-2's, where there is no `tokenizer.json`           |
| `chat_template.jinja`, `additional_chat_templates/` | the chat templates, before those of the |
|                          | `tokenizer_config.json`                                 |

What other files say of special and added tokens is gathered by `special_tokens.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.tokenizers.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import is_ours as is_bpe
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.resizing import ids_of_tokens
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, stop_ids, vocab_size_of
from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted, warn
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.huggingface.special_tokens import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    SpecialTokens,
    read_object,
    special_tokens_of,
)

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
VOCABULARY_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
_LARGEST_TEMPLATE = 1 << 20  # bytes


def open_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None if there is none that can be read.

    Raises:
        SurgeryError: a file is damaged, or beyond its limits.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).is_file():
        with foreign_file(folder / TOKENIZER):
            return _opened(read_object(folder / TOKENIZER), folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        with foreign_file(folder / "vocab.json"):
            words = BPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
            return _opened(words.to_json(), folder)
    if (folder / "tokenizer.model").is_file():
        warn(
            f"{folder} has only a tokenizer.model, which is not read: the model opens without a "
            "tokenizer (transformers can save it as tokenizer.json)"
        )
    return None


def _opened(contents: dict[str, Any], folder: Path) -> Tokenizer:
    templates = _chat_templates(folder)
    template = _usual(templates)
    if _is_character(contents):
        return with_chat_template(CharacterTokenizer.from_json(contents), template)
    found = special_tokens_of(folder, set(ids_of_tokens(contents)))
    plain = all(token.get("special") for token in contents.get("added_tokens") or [])
    if is_bpe(contents) and plain and not templates and _says_nothing_new(found):
        return BPETokenizer.from_json(contents)
    return PretrainedTokenizer(
        contents,
        stop_ids=found.stop_ids,
        chat_template=template,
        special_tokens=found.named,
        extra_special_tokens=found.extra,
        added_tokens=found.added,
        settings=found.settings,
        chat_templates=templates if len(templates) > 1 else {},
    )


def _says_nothing_new(found: SpecialTokens) -> bool:
    """Whether a folder says no more of a byte-level BPE than its own kind knows."""
    tokens = {*map(str, found.named.values()), *map(str, found.extra), *map(str, found.added)}
    return tokens <= {END_OF_TEXT} and "pad_token" not in found.named


def chat_template_in(folder: Path) -> str | None:
    """The chat template in a model's or an adapter's folder, in Jinja; None if there is none.

    Raises:
        SurgeryError: a file is damaged, or beyond its limits.
    """
    return _usual(_chat_templates(folder))


def with_chat_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """A tokenizer that was opened here, with this chat template in the place of all others."""
    if isinstance(tokenizer, BPETokenizer) and template is not None:
        tokenizer = PretrainedTokenizer(tokenizer.to_json(), stop_ids=list(tokenizer.stop_ids))
    if isinstance(tokenizer, (CharacterTokenizer, PretrainedTokenizer)):
        tokenizer.chat_template = template
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.chat_templates = {}
    return tokenizer


def write_chat_template(template: str, folder: Path) -> None:
    """Writes the chat template of a folder that is being made, in the place of all others there."""
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    shutil.rmtree(folder / CHAT_TEMPLATES, ignore_errors=True)
    config = read_object(folder / TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG, config)


def _usual(templates: dict[str, str]) -> str | None:
    return templates.get("default", next(iter(templates.values()), None))


def _chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates by name; files of their own win over those in the config."""
    files = {"default": folder / CHAT_TEMPLATE}
    files |= {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))[:16]}
    found = {name: _template_text(path) for name, path in files.items() if path.is_file()}
    return found or _templates_in(folder / TOKENIZER_CONFIG)


def _template_text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise SurgeryError(f"{path} has {path.stat().st_size:,} bytes; no template is so long")
    with foreign_file(path):
        return path.read_text(encoding="utf-8")


def _templates_in(path: Path) -> dict[str, str]:
    """The templates in a `tokenizer_config.json`: one, or a list of named ones."""
    value = read_object(path).get("chat_template")
    if value is None:
        return {}
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    found = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise SurgeryError(
                f"{path} holds {quoted(value)} as chat_template, where a text, or a list of named "
                "texts, belongs"
            )
        found[name] = template
    return found


def _is_character(contents: dict[str, Any]) -> bool:
    model = contents.get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return False
    vocab = model.get("vocab")
    alone = not contents.get("added_tokens") and contents.get("post_processor") is None
    return alone and isinstance(vocab, dict) and all(len(token) == 1 for token in vocab)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a folder that holds a tokenizer alone, whole or not at all; transformers opens it.

    What is written is opened again and compared before it counts as written. A folder of ours that
    lies there is replaced.

    Raises:
        SurgeryError: the tokenizer has no `tokenizer.json`, the folder holds something else, or
            what was written encodes otherwise. There is no new folder then.
    """
    from nanogpt_surgery.formats.comparison import check_tokenizer

    def write(new: Path) -> None:
        write_tokenizer_files(tokenizer, new)
        check_tokenizer(tokenizer, open_tokenizer(new))

    write_folder(folder, write)


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, context: int | None = None) -> None:
    """Writes the tokenizer's files into a folder that is being made; transformers reads them.

    `context` is the longest text of the model in tokens, where there is a model.

    Raises:
        SurgeryError: the tokenizer is of a kind that has no `tokenizer.json`.
    """
    if not isinstance(tokenizer, (CharacterTokenizer, BPETokenizer, PretrainedTokenizer)):
        raise SurgeryError(
            f"a {type(tokenizer).__name__} has no tokenizer.json to be saved as",
            "use a CharacterTokenizer, BPETokenizer or PretrainedTokenizer",
        )
    tokenizer.save(folder / TOKENIZER)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if context is not None:
        config["model_max_length"] = context
    if isinstance(tokenizer, BPETokenizer):
        config["eos_token"] = tokenizer.token_of(tokenizer.eos_id)
    if isinstance(tokenizer, PretrainedTokenizer):
        config |= _pretrained_config(tokenizer)
    write_json(folder / TOKENIZER_CONFIG, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    template = getattr(tokenizer, "chat_template", None)
    if template is not None and "chat_template" not in config:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _pretrained_config(tokenizer: PretrainedTokenizer) -> dict[str, Any]:
    """A `tokenizer_config.json`; flags of added tokens stand in the `tokenizer.json`."""
    config = tokenizer.settings | tokenizer.special_tokens
    config |= {role: config.get(role) for role in ("bos_token", "eos_token")}
    if tokenizer.extra_special_tokens:
        config["extra_special_tokens"] = tokenizer.extra_special_tokens
    ends = [[], [tokenizer.eos_id]]
    if tokenizer.prefix_ids in ([], [tokenizer.bos_id]) and tokenizer.suffix_ids in ends:
        config["add_bos_token"] = bool(tokenizer.prefix_ids)
        config["add_eos_token"] = bool(tokenizer.suffix_ids)
    if tokenizer.chat_templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in tokenizer.chat_templates.items()
        ]
    return config


def moved_ids(folder: Path, tokenizer: Tokenizer | None) -> dict[int, int] | None:
    """Returns for each id in a folder's files the one that its token has in another tokenizer.

    None where the tokenizer has the folder's own tokens, under their ids.
    """
    to_json = getattr(tokenizer, "to_json", None)
    if to_json is None:
        return None
    now = ids_of_tokens(to_json())
    with foreign_file(folder / TOKENIZER):
        if ids_of_tokens(read_object(folder / TOKENIZER)) == now:
            return None
    there = open_tokenizer(folder)
    before = {} if there is None else ids_of_tokens(there.to_json())  # type: ignore[attr-defined]
    if before == now or not before:
        return None
    return {i: now[token] for token, i in before.items() if token in now}


_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids",
                 "forced_decoder_ids", "sequence_bias", "stop_token_ids")  # fmt: skip


def with_moved_ids(contents: dict[str, Any], moved: dict[int, int]) -> dict[str, Any]:
    """Returns a config of a model, or of its generation, with the ids that its tokens have now.

    An id whose token has gone is null, or left out of a list. Lists that other programs read for
    their generation alone are left out where a token of theirs has another id.
    """
    new = dict(contents)
    for key, value in contents.items():
        if key.endswith("_token_id") and isinstance(value, list):
            new[key] = [moved[i] for i in value if i in moved] or None
        elif key.endswith("_token_id"):
            new[key] = moved.get(value) if type(value) is int else value
        elif key in _LISTS_OF_IDS and any(moved.get(i) != i for i in _numbers_in(value)):
            del new[key]
    return new


def _numbers_in(value: Any) -> list[int]:
    if isinstance(value, list):
        return [i for one in value for i in _numbers_in(one)]
    return [value] if type(value) is int else []


def check_ids(tokenizer: Tokenizer | None, rows: int, path: str | Path) -> None:
    """Raises `SurgeryError` if a tokenizer has ids that a model of `rows` tokens has no row for."""
    if tokenizer is None or not hasattr(tokenizer, "vocab_size"):
        return
    size = vocab_size_of(tokenizer)
    if size <= rows:
        return
    tokens: dict[int, str] = getattr(tokenizer, "tokens_from", lambda _: {})(rows)
    shown = ", ".join(f"{quoted(token)} ({i})" for i, token in list(tokens.items())[:4])
    more = f" and {len(tokens) - 4:,} more" if len(tokens) > 4 else ""
    raise SurgeryError(
        f"the tokenizer of {path} has ids up to {size - 1:,}, the model rows for {rows:,} tokens"
        + (f": no row for {shown}{more}" if shown else ""),
        f"take what is too much out of {TOKENIZER} and {TOKENIZER_CONFIG}, or give the model rows "
        f"for it (in transformers: model.resize_token_embeddings({size}))",
    )


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns `bos_token_id` and `eos_token_id` of a `config.json`."""
    first = getattr(tokenizer, "eos_id", None)
    ends = sorted(stop_ids(tokenizer), key=lambda i: (i != first, i))
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": getattr(tokenizer, "bos_id", None), "eos_token_id": eos}
