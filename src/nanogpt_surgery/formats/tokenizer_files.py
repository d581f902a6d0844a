"""The tokenizer in a model folder: `tokenizer.json` and what other files say about its ids.

| file                     | what is read                                            |
|--------------------------|---------------------------------------------------------|
| `tokenizer.json`         | the tokenizer itself                                    |
| `vocab.json`, `merges.txt` | GPT-2's, where there is no `tokenizer.json`           |
| `tokenizer_config.json`  | BOS, EOS, `add_bos_token`, the chat template            |
| `chat_template.jinja`    | the chat template, where newer folders keep it          |
| `generation_config.json`, `config.json` | more ids that end a turn                 |
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from nanogpt_surgery.atomic import whole_folder
from nanogpt_surgery.data.bpe_tokenizer import BPETokenizer
from nanogpt_surgery.data.bpe_tokenizer import is_ours as is_bpe
from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizer import Tokenizer, stop_ids
from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
from nanogpt_surgery.files import read_json, write_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_LARGEST_TEMPLATE = 1 << 20  # bytes


def open_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None if there is none that can be read.

    Raises:
        SurgeryError: a file is damaged, or beyond its limits.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).is_file():
        contents = _object(folder / TOKENIZER)
        if _is_character(contents):
            return CharacterTokenizer.from_json(contents)
        return BPETokenizer.from_json(contents) if is_bpe(contents) else _opened(contents, folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return BPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    if (folder / "tokenizer.model").is_file():
        warnings.warn(
            f"{folder} has only a tokenizer.model, which is not read: the model opens without a "
            "tokenizer (transformers can save it as tokenizer.json)",
            SurgeryWarning,
            stacklevel=2,
        )
    return None


def _opened(contents: dict[str, Any], folder: Path) -> PretrainedTokenizer:
    config = _object(folder / TOKENIZER_CONFIG)
    named = {key: _written(config.get(key)) for key in ("bos_token", "eos_token")}
    ids = _ids_of(contents, [token for token in named.values() if token])
    ends = [ids.get(named["eos_token"])]
    for file in ("generation_config.json", "config.json"):
        eos = _object(folder / file).get("eos_token_id")
        ends += eos if isinstance(eos, list) else [eos]
    return PretrainedTokenizer(
        contents,
        bos_id=ids.get(named["bos_token"]),
        stop_ids=list(dict.fromkeys(i for i in ends if isinstance(i, int))),
        add_bos=config.get("add_bos_token"),
        chat_template=_chat_template(folder, config),
    )


def _ids_of(contents: dict[str, Any], tokens: list[str]) -> dict[str | None, int]:
    """The ids of a few tokens, read off the contents: an encoder made for it takes memory twice."""
    model, added = contents.get("model"), contents.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    listed = vocab if isinstance(vocab, list) else []  # a unigram model's: token and score
    rows: list[tuple[Any, Any]] = [
        (row[0], i) for i, row in enumerate(listed) if isinstance(row, list) and row
    ]
    rows += [*vocab.items()] if isinstance(vocab, dict) else []
    for token in added if isinstance(added, list) else []:
        rows += [(token.get("content"), token.get("id"))] if isinstance(token, dict) else []
    found: dict[str | None, int] = {}
    found |= {token: i for token, i in rows if token in tokens and isinstance(i, int)}
    return found


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise SurgeryError(f"{path} has {path.stat().st_size:,} bytes; no template is so long")
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    contents = read_json(path) if path.is_file() else {}
    if not isinstance(contents, dict):
        raise SurgeryError(f"{path} holds a {type(contents).__name__} where an object belongs")
    return contents


def _written(token: Any) -> str | None:
    """A special token's text, whether it lies there as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _is_character(contents: dict[str, Any]) -> bool:
    model = contents.get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return False
    return all(len(token) == 1 for token in model.get("vocab") or [])


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a folder that holds a tokenizer alone, whole or not at all; transformers opens it.

    What is written is opened again and compared before it counts as written. A folder of ours that
    lies there is replaced.

    Raises:
        SurgeryError: the tokenizer has no `tokenizer.json`, the folder holds something else, or
            what was written encodes otherwise. There is no new folder then.
    """
    from nanogpt_surgery.formats.tokenizer_comparison import check_tokenizer

    with whole_folder(folder) as temporary:
        write_tokenizer_files(tokenizer, temporary)
        check_tokenizer(tokenizer, open_tokenizer(temporary))


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, context: int | None = None) -> None:
    """Write the tokenizer's files into a folder that is being made; transformers reads them.

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
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if context is not None:
        config["model_max_length"] = context
    if not isinstance(tokenizer, CharacterTokenizer):
        config["eos_token"] = tokenizer.token_of(tokenizer.eos_id)
    if isinstance(tokenizer, PretrainedTokenizer):
        config["bos_token"] = tokenizer.token_of(tokenizer.bos_id)
        config["add_bos_token"] = tokenizer.add_bos
        if tokenizer.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(folder / TOKENIZER_CONFIG, config)


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What `config.json` says of a tokenizer: `bos_token_id` and `eos_token_id`."""
    first = getattr(tokenizer, "eos_id", None)
    ends = sorted(stop_ids(tokenizer), key=lambda i: (i != first, i))
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": getattr(tokenizer, "bos_id", None), "eos_token_id": eos}
