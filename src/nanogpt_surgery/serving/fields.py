"""The fields of a request, each with its kind and its range.

Fields that change nothing are ignored, as are unknown ones. A field that would change the answer
and that this server cannot follow is refused by its name: a client that asks for JSON by a schema,
and gets anything, would not notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanogpt_surgery.errors import quoted
from nanogpt_surgery.generation.settings import MOST_SEED, SamplingSettings
from nanogpt_surgery.serving.http import ApiError
from nanogpt_surgery.values import SWITCH, Kind, integer, number

MOST_ROWS = 64  # texts that one request asks for
MOST_TOKENS = 1 << 20
_MOST_STOPS, _LONGEST_STOP = 4, 1_000
_MOST_BIASES = 1_000
_LONGEST_NAME = 256


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= _MOST_STOPS
        and all(_is_text(text) and 0 < len(text) <= _LONGEST_STOP for text in texts)
    )


def _are_biases(value: Any) -> bool:
    bias = number("", lambda x: -100 <= x <= 100)
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_BIASES
        and all(re.fullmatch(r"[0-9]{1,9}", key) and bias.holds(one) for key, one in value.items())
    )


def _is_prompt(value: Any) -> bool:
    if _is_text(value) or _are_ids(value):
        return True
    several = isinstance(value, list) and 0 < len(value) <= MOST_ROWS
    return several and (all(map(_is_text, value)) or all(map(_are_ids, value)))


def _are_ids(value: Any) -> bool:
    most = integer(0, 2**31)
    return isinstance(value, list) and len(value) > 0 and all(map(most.holds, value))


def _is_stream_options(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("include_usage") or False) is bool


@dataclass(frozen=True)
class Field:
    """One field: of which kind its value must be, and its value where it is absent or null."""

    kind: Kind
    default: Any = None


NAME = Kind(
    f"a text of 1 to {_LONGEST_NAME} characters",
    lambda x: _is_text(x) and 0 < len(x) <= _LONGEST_NAME,
)
TEXT = Kind("a text", _is_text)
PROMPT = Kind(
    f"a text, a list of ids from 0, or a list of 1 to {MOST_ROWS} such, none of them empty lists",
    _is_prompt,
)
IDS = Kind("a list of ids from 0", lambda x: x == [] or _are_ids(x))
STOP = Kind(
    f"a text, or a list of at most {_MOST_STOPS}, each of 1 to {_LONGEST_STOP:,} characters",
    _is_stop,
)
BIASES = Kind(
    f"an object of at most {_MOST_BIASES:,} numbers from -100 to 100, each by an id in digits",
    _are_biases,
)
MESSAGES = Kind(
    "a list of 1 to 1,000 messages", lambda x: isinstance(x, list) and 0 < len(x) <= 1_000
)
STREAM_OPTIONS = Kind("an object whose include_usage is true or false", _is_stream_options)
TOKENS = integer(0, MOST_TOKENS)
PENALTY = number("from -2 to 2", lambda x: -2 <= x <= 2)

SAMPLING = {
    "temperature": Field(number("from 0 to 2", lambda x: 0 <= x <= 2), 1.0),
    "top_p": Field(number("above 0 and at most 1", lambda x: 0 < x <= 1), 1.0),
    "top_k": Field(integer(-1, 2**31), 0),
    "min_p": Field(number("from 0 to 1", lambda x: 0 <= x <= 1), 0.0),
    "presence_penalty": Field(PENALTY, 0.0),
    "frequency_penalty": Field(PENALTY, 0.0),
    "repetition_penalty": Field(number("from 0.01 to 100", lambda x: 0.01 <= x <= 100), 1.0),
    "logit_bias": Field(BIASES, {}),
}
COMMON = SAMPLING | {
    "model": Field(NAME),
    "n": Field(integer(1, MOST_ROWS), 1),
    "seed": Field(integer(-(2**63), 2**63 - 1)),
    "stop": Field(STOP, []),
    "stream": Field(SWITCH, False),
    "stream_options": Field(STREAM_OPTIONS),
}
COMPLETION = COMMON | {
    "prompt": Field(PROMPT),
    "max_tokens": Field(TOKENS),
    "echo": Field(SWITCH, False),
    "logprobs": Field(integer(0, 5)),
    "best_of": Field(integer(1, MOST_ROWS)),
}
CHAT = COMMON | {
    "messages": Field(MESSAGES),
    "max_completion_tokens": Field(integer(1, MOST_TOKENS)),
    "max_tokens": Field(integer(1, MOST_TOKENS)),
    "logprobs": Field(SWITCH, False),
    "top_logprobs": Field(integer(0, 20)),
}


def _is_empty(value: Any) -> bool:
    return value in ("", [], {}, False)


def _is_left_open(choice: Any) -> bool:
    return choice in ("auto", "none")


# Each would change the answer; where its value asks for what is done anyway, it is ignored.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "suffix": _is_empty,
    "tools": _is_empty,
    "tool_choice": _is_left_open,
    "functions": _is_empty,
    "function_call": _is_left_open,
    "response_format": lambda x: x == {"type": "text"},
    "modalities": lambda x: x == ["text"],
    "audio": _is_empty,
    "web_search_options": lambda _: False,
    "structured_outputs": _is_empty,
    "guided_json": _is_empty,
    "guided_regex": _is_empty,
    "guided_choice": _is_empty,
    "guided_grammar": _is_empty,
    "use_beam_search": _is_empty,
}


def read_fields(body: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the value of each field.

    Raises:
        ApiError: a value is not of its kind, or a field asks for what is not there.
    """
    for name, is_harmless in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and not is_harmless(value):
            raise ApiError(
                400, f"{name} is not supported by this server", param=name, code="unsupported"
            )
    found = {}
    for name, field in fields.items():
        value = body.get(name)
        if value is not None and not field.kind.holds(value):
            what = f"{name} is {quoted(value)}; it must be {field.kind.words}"
            raise ApiError(400, what, param=name, code="invalid_value")
        found[name] = field.default if value is None else value
    return found


def required(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a field that must be there.

    Raises:
        ApiError: it is not.
    """
    if values[name] is None:
        raise ApiError(400, f"{name} is missing", param=name, code="missing")
    return values[name]


def sampling_of(values: Mapping[str, Any], vocab_size: int) -> SamplingSettings:
    """Returns how tokens are drawn.

    Raises:
        ApiError: a bias is on an id outside the vocabulary.
    """
    chosen = {name: values[name] for name in SAMPLING}
    chosen["top_k"] = chosen["top_k"] if chosen["top_k"] > 0 else None  # 0 and -1: all
    chosen["logit_bias"] = {int(key): float(one) for key, one in chosen["logit_bias"].items()}
    if outside := [index for index in chosen["logit_bias"] if index >= vocab_size]:
        what = f"logit_bias names the id {outside[0]}; the vocabulary is 0 to {vocab_size - 1}"
        raise ApiError(400, what, param="logit_bias", code="invalid_value")
    return SamplingSettings(**chosen)


def stop_strings(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the texts that end an answer."""
    stop = values["stop"]
    return (stop,) if isinstance(stop, str) else tuple(stop)


def seed_of(values: Mapping[str, Any], sample: int) -> int | None:
    """Returns the seed of one of several samples of a prompt."""
    return None if values["seed"] is None else (values["seed"] + sample) % (MOST_SEED + 1)


ROLES = {"developer": "system"} | {role: role for role in ("system", "user", "assistant")}


def messages_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a conversation, each a role and a text.

    Raises:
        ApiError: a message is none, has another role, or holds what is no text.
    """
    return [_message(i, one) for i, one in enumerate(required(values, "messages"))]


def _message(place: int, message: Any) -> dict[str, Any]:
    where = f"messages[{place}]"
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        what = f"{where}.role is {quoted(role)}; it must be one of {', '.join(ROLES)}"
        raise ApiError(400, what, param=f"{where}.role", code="invalid_value")
    if message.get("tool_calls"):
        raise ApiError(400, "tools are not supported", param=f"{where}.tool_calls")
    return {"role": ROLES[role], "content": _content(f"{where}.content", message.get("content"))}


def _content(where: str, content: Any) -> str:
    """Returns a message's text; of several parts each must be a text."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) and content else [None]
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = "of no type" if kind is None else f"a part of the type {quoted(kind)}"
            at = f"{where}[{i}]" if isinstance(content, list) else where
            raise ApiError(
                400,
                f"{at} is {found}; it must be text: nothing else is read, and no address fetched",
                param=at,
                code="invalid_value",
            )
    return "".join(part["text"] for part in parts)
