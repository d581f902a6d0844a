"""Special and added tokens of a model folder, gathered from all files in transformers' order.

| file                      | what it says                                                      |
|---------------------------|-------------------------------------------------------------------|
| `tokenizer_config.json`   | `*_token` as text or object, `extra_special_tokens` (older:        |
|                           | `additional_special_tokens`), `added_tokens_decoder`              |
| `special_tokens_map.json` | the same roles; it wins, but is read only without a decoder       |
| `added_tokens.json`       | token and id; read only without a decoder                         |
| `generation_config.json`  | the ids at which an answer ends; without it, `config.json`        |

Ids are given by the `tokenizers` package as in transformers: a token that the vocabulary has keeps
its id, a new one gets the next. Names that a tokenizer's class has by default count where the
vocabulary has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from nanogpt_surgery.errors import SurgeryError, quoted, warn
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.formats.huggingface.config import CONFIG

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"

# In the order in which transformers adds what is missing.
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_END = "<|endoftext|>"
_CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
_CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}

# Of a tokenizer_config.json, what is not carried over: what has a place of its own in what we
# write, names of files, code, and arguments that only the original class understands.
_NOT_CARRIED = set(
    """
    tokenizer_class chat_template added_tokens_decoder additional_special_tokens
    extra_special_tokens model_specific_special_tokens add_bos_token add_eos_token auto_map
    init_inputs name_or_path fast_tokenizer_files slow_tokenizer_class files_loaded is_local
    local_files_only backend device_map
    """.split()
)
_LARGEST_SETTINGS = 1 << 16  # characters


@dataclass
class SpecialTokens:
    """The special and added tokens of a model folder, and what else its config says of them."""

    named: dict[str, str | AddedToken] = field(default_factory=dict)
    """tokens by role: "bos_token", "pad_token", …"""
    extra: list[str | AddedToken] = field(default_factory=list)
    """special tokens without a role"""
    added: list[AddedToken] = field(default_factory=list)
    """tokens that other files than the `tokenizer.json` add, in the order of their ids"""
    stop_ids: list[int] = field(default_factory=list)
    """the ids at which generation ends, as the model's files say"""
    settings: dict[str, Any] = field(default_factory=dict)
    """what else the `tokenizer_config.json` says"""


def special_tokens_of(folder: Path, vocabulary: set[str]) -> SpecialTokens:
    """Gathers what a folder's files say; `vocabulary` holds the tokens of its `tokenizer.json`.

    Raises:
        SurgeryError: a file is damaged, or holds what is no token where a token belongs.
    """
    config, model = read_object(folder / TOKENIZER_CONFIG), read_object(folder / CONFIG)
    said, path = dict(config), folder / TOKENIZER_CONFIG
    if not said.get("extra_special_tokens") and "additional_special_tokens" in said:
        said["extra_special_tokens"] = said.pop("additional_special_tokens")
    decoder = said.get("added_tokens_decoder")
    if decoder is None:
        said |= _of_map(folder, said)
        added = _of_added_tokens(folder, said)
    else:
        added = _of_decoder(decoder, path)
    found = SpecialTokens(added=added, settings=_carried(config))
    found.named, found.extra = _roles(said, path, {token.content: token for token in added})
    kind = _class_of(config, model)
    for role, token in _CLASS_DEFAULTS.get(kind, {}).items():
        if role not in said and token in vocabulary:
            found.named[role] = token
    if kind == "LlamaTokenizer":
        found.settings.setdefault("padding_side", "left")
    found.stop_ids = _stop_ids(folder, model)
    return found


def _of_map(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a `special_tokens_map.json`; extra tokens are put behind the config's."""
    path = folder / SPECIAL_TOKENS_MAP
    entries = read_object(path)
    more = entries.pop("extra_special_tokens", None)
    older = entries.pop("additional_special_tokens", None)
    if more is None and not config.get("extra_special_tokens"):
        more = older
    if isinstance(more, list):
        there = config.get("extra_special_tokens") or []
        there = [] if isinstance(there, dict) else list(there)
        more = there + [token for token in more if token not in there]
    for role, value in entries.items():
        if role in ROLES and value is not None:
            _token(value, path, role)  # refused under the name of this file
    return entries if more is None else entries | {"extra_special_tokens": more}


def _of_decoder(decoder: Any, path: Path) -> list[AddedToken]:
    if not isinstance(decoder, dict):
        raise _not(decoder, path, "added_tokens_decoder", "an object of tokens by id")
    tokens = {_index(i, path): _token(token, path, i) for i, token in decoder.items()}
    ordered = [token for _, token in sorted(tokens.items())]
    return [AddedToken(t, special=False) if isinstance(t, str) else t for t in ordered]


def _of_added_tokens(folder: Path, config: dict[str, Any]) -> list[AddedToken]:
    path = folder / ADDED_TOKENS
    ids = read_object(path)
    for token, index in ids.items():
        if type(index) is not int:
            raise _not(index, path, token, "an id")
    named, extra = _roles(config, folder / TOKENIZER_CONFIG, {})
    special = {str(token) for token in [*named.values(), *extra]}
    return [
        AddedToken(token, normalized=token not in special, special=token in special)
        for token, _ in sorted(ids.items(), key=lambda entry: entry[1])
    ]


def _index(text: str, path: Path) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _not(text, path, "added_tokens_decoder", "an id")
    return int(text)


def _roles(
    config: dict[str, Any], path: Path, added: dict[str, AddedToken]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """The tokens by role, and those without one; `added` have flags that count."""
    extra = config.get("extra_special_tokens")
    if extra is not None and not isinstance(extra, (list, dict)):
        raise _not(extra, path, "extra_special_tokens", "a list of tokens")
    values = {role: config[role] for role in ROLES if config.get(role) is not None}
    values |= {
        role: value
        for role, value in config.items()
        if role not in ROLES and role.endswith("_token") and isinstance(value, (str, dict))
    }
    values |= extra if isinstance(extra, dict) else {}
    named = {role: _token(value, path, role) for role, value in values.items()}
    named = {role: added.get(str(token), token) for role, token in named.items() if str(token)}
    listed = extra if isinstance(extra, list) else []
    return named, [_token(value, path, "extra_special_tokens") for value in listed]


def _token(value: Any, path: Path, part: str) -> str | AddedToken:
    """A token, whether it lies there as text or as an object with flags."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
        wrong = next((flag for flag, on in flags.items() if type(on) is not bool), None)
        if wrong:
            raise _not(flags[wrong], path, f"{part}.{wrong}", "true or false")
        return AddedToken(value["content"], **({"special": True} | flags))
    if not isinstance(value, str):
        raise _not(value, path, part, "a token: text, or an object with its content")
    return value


def _not(value: Any, path: Path, part: str, wanted: str) -> SurgeryError:
    return SurgeryError(f"{path} holds {quoted(value)} at {quoted(part)}, where {wanted} belongs")


def _class_of(config: dict[str, Any], model: dict[str, Any]) -> str:
    """The name of the tokenizer's class in transformers, of which there are defaults."""
    for value in (config.get("tokenizer_class"), model.get("tokenizer_class")):
        if isinstance(value, str):
            return value.removesuffix("Fast")
    kind = model.get("model_type")
    return _CLASS_OF_MODEL.get(kind, "") if isinstance(kind, str) else ""


def _carried(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the harmless part of a `tokenizer_config.json` beyond its tokens."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in _NOT_CARRIED
        and not key.endswith(("_token", "_file", "_path"))
        and not (isinstance(value, dict) and value.get("__type") == "AddedToken")
    }
    return kept if sum(map(len, map(repr, kept.items()))) <= _LARGEST_SETTINGS else {}


def _stop_ids(folder: Path, model: dict[str, Any]) -> list[int]:
    """The ids at which generation ends: the generation config's, or else the model config's."""
    for path, contents in (
        (folder / GENERATION_CONFIG, read_object(folder / GENERATION_CONFIG)),
        (folder / CONFIG, model),
    ):
        value = contents.get("eos_token_id")
        if value is not None:
            return _valid_ids(value if isinstance(value, list) else [value], path, model)
    return []


def _valid_ids(values: list[Any], path: Path, model: dict[str, Any]) -> list[int]:
    """The ids that a model can generate; -1 is how many files write that there is none."""
    size = model.get("vocab_size")
    rows = size if type(size) is int else 2**31
    ids = [i for i in values if type(i) is int and 0 <= i < rows]
    wrong = [i for i in values if i not in ids and not (type(i) is int and i < 0)]
    if wrong:
        warn(
            f"{path} gives {quoted(wrong[0])} as eos_token_id, which is no id of a vocabulary of "
            f"{rows:,}; it is not used"
        )
    return list(dict.fromkeys(ids))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file.

    Raises:
        SurgeryError: the file holds something else.
    """
    contents = read_json(path) if path.is_file() else {}
    if not isinstance(contents, dict):
        raise SurgeryError(f"{path} holds a {type(contents).__name__} where an object belongs")
    return contents
