"""Records of the common forms of instruction data as conversations; no field goes in silence.

OpenAI's messages, ShareGPT's conversations, Alpaca's instruction, input and output (with system and
history), TRL's prompt and completion (texts or messages), and the names that other sets of data
give the same. A field that would change what is learned and cannot be honoured is an error, and so
are two fields that say the same kind of thing differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nanogpt_surgery.data.conversations.chat import MASKED, ROLES, TRAINED, Message, Messages
from nanogpt_surgery.data.conversations.record_files import field_twice, from_json, keys_of
from nanogpt_surgery.errors import quoted

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS, INPUTS = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERS = ("completion", "answer", "response", "output")
SYSTEM = ("system", "system_prompt")
NOT_TEXT = ("images", "image", "videos", "video", "audio", "audios")
NO_EFFECT = ("adapters", "settings", "parallel_tool_calls")  # on the text
# Fields that say whether an answer is trained on, and what they say where it is.
MARKS = dict.fromkeys(TRAINED, True) | dict.fromkeys(MASKED, False)
KNOWN = {
    *(*NO_EFFECT, *NOT_TEXT, *SYSTEM),
    *("label", "weight", "tools", "functions", "chat_template_kwargs"),
}
EXPECTED = (
    "a record has messages (or ShareGPT's conversations); or prompt and completion; or "
    "instruction, input and output; a table has a column question and a column answer"
)
_OPENAI = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_SHAREGPT = {
    **dict.fromkeys(("human", "user", "input"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "output"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles of which the value is a call
_ROLES = {"role": _OPENAI, "from": _SHAREGPT}
_SHOWN = {"role": ROLES, "from": ("human", "gpt", "system", "tool", "function_call")}


class RecordError(Exception):
    """A record cannot be read: which of its fields, and why."""

    def __init__(self, field: str, what: str):
        super().__init__(f"{field}: {what}" if field else what)


def conversation_of(record: Any) -> tuple[Messages, list[str]]:
    """The conversation of a record, and the names of fields that are not used.

    Raises:
        RecordError: it is of no known form, or says something that cannot be honoured.
    """
    if not isinstance(record, dict):
        raise RecordError("", keys_of(record))
    if found := [field for field in NOT_TEXT if record.get(field)]:
        raise RecordError(found[0], "is not text, and text alone is trained on")
    wanted = _check_wanted(record)
    messages, used = _conversation(record) or _pair(record)
    messages = [*_system(record, messages[0]), *messages]
    known = KNOWN | wanted | used
    unused = [name for name, value in record.items() if name not in known and not _empty(value)]
    return Messages(messages, _variables(record)), unused


def _conversation(record: dict[str, Any]) -> tuple[list[Message], set[str]] | None:
    """The messages of a list of them, and the fields used; None where there is no list."""
    lists = [key for key in CONVERSATIONS if isinstance(record.get(key), list)]
    if not lists:
        return None
    filled = _filled(record, lists)
    if not filled:
        raise RecordError(lists[0], "is an empty list")
    if record.get("history"):
        raise RecordError("history", f"stands beside {filled[0]}")
    return _agreed({key: _messages(record[key], key) for key in filled}), set(filled)


def _agreed(values: Mapping[str, Any], place: str = "") -> Any:
    """Returns what fields say that mean the same kind of thing; None if there is no field.

    Raises:
        RecordError: they do not say the same.
    """
    first = next(iter(values), "")
    for field in values:
        if values[field] != values[first]:
            raise RecordError(f"{place}{field}", f"stands beside {first}, and says something else")
    return values.get(first)


def _check_wanted(record: dict[str, Any]) -> set[str]:
    """The fields by which a record says that its answer is one to learn.

    Raises:
        RecordError: it says that it is not.
    """
    if not _empty(record.get("rejected")):
        raise RecordError("rejected", "this is preference data; one answer is trained on")
    meanings = dict.fromkeys(("true", "1", "1.0"), True) | dict.fromkeys(
        ("false", "0", "0.0"), False
    )
    wanted = set()
    for key, trained in (MARKS | {"label": True}).items():
        said = meanings.get(str(record.get(key)).lower())
        if said is (not trained):
            what = "the answer is not to be trained on; leave the record out"
            raise RecordError(key, f"is {quoted(record[key])}: {what}")
        if said is not None:
            wanted.add(key)
    weight = record.get("weight")
    if not _empty(weight) and "weight" not in wanted:
        raise RecordError("weight", f"is {quoted(weight)}; messages have weights, records none")
    return wanted


def _empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _filled(record: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the fields that say something."""
    return [name for name in names if not _empty(record.get(name))]


def _pair(record: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The messages of a question with its answer, and the fields used."""
    asked, beside = _filled(record, QUESTIONS), _filled(record, INPUTS)
    if "query" in asked and len(asked) > 1:  # another name for Alpaca's input
        asked.remove("query")
        beside.append("query")
    if not asked and beside[:1] == ["input"]:
        asked = [beside.pop(0)]
    answers = [key for key in ANSWERS if key in record]
    if not answers or not asked:
        empty = [key for key in (*QUESTIONS, "input") if answers and key in record and not asked]
        raise RecordError(
            *((empty[0], "is empty; a question is needed") if empty else ("", keys_of(record)))
        )
    answered = [key for key in answers if record[key] is not None]
    if not answered:
        raise RecordError(answers[0], "is empty; an answer is needed")
    for names in (asked, answered, beside):
        _agreed({name: record[name] for name in names})
    before = record[asked[0]]
    if beside:
        before = f"{_text(before, asked[0])}\n\n{_text(record[beside[0]], beside[0])}"
    prompt = _said(before, asked[0], "user")
    if isinstance(before, list):  # TRL trains on the completion alone
        prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    begins = 1 if prompt[0]["role"] == "system" else 0
    history = _history(record.get("history"))
    reply = _said(record[answered[0]], answered[0], "assistant")
    used = {*asked, *answered, *beside, "history"}  # several names of one thing say the same
    return [*prompt[:begins], *history, *prompt[begins:], *reply], used


def _said(value: Any, field: str, role: str) -> list[Message]:
    """Returns the messages in a field: a text of a role, or a list of messages."""
    if value == []:
        raise RecordError(field, "is an empty list")
    if isinstance(value, list):
        return _messages(value, field)
    return [{"role": role, "content": _text(value, field)}]


def _messages(raws: list[Any], field: str) -> list[Message]:
    return [_message(raw, f"{field}[{i}]") for i, raw in enumerate(raws)]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RecordError(field, f"is {quoted(value)}, not a text")
    return value


def _history(turns: Any) -> list[Message]:
    if _empty(turns):
        return []
    if not isinstance(turns, list):
        raise RecordError("history", f"is {quoted(turns)}, not a list of exchanges")
    said: list[Message] = []
    for i, turn in enumerate(turns):
        field = f"history[{i}]"
        if isinstance(turn, dict):
            said.append(_message(turn, field))
        elif isinstance(turn, list) and len(turn) == 2:
            said += _said(_text(turn[0], f"{field}[0]"), field, "user")
            said += _said(_text(turn[1], f"{field}[1]"), field, "assistant")
        else:
            raise RecordError(field, f"is {quoted(turn)}, not a question with its answer")
    return said


def _system(record: dict[str, Any], first: Message) -> list[Message]:
    """The system message that a field of the record says, unless the messages begin with it."""
    said = {key: _text(record[key], key) for key in _filled(record, SYSTEM)}
    text = _agreed(said)
    if text is None:
        return []
    if first["role"] != "system":
        return [{"role": "system", "content": text}]
    if first["content"] != text:
        raise RecordError(next(iter(said)), "is another system prompt than the first message's")
    return []


def _variables(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables that a template is given beside the messages."""
    values = record.get("chat_template_kwargs")
    if not _empty(values) and not isinstance(values, dict):
        raise RecordError("chat_template_kwargs", f"is {quoted(values)}, not an object")
    variables = dict(values or {})
    if taken := {"messages", "tools", "add_generation_prompt"} & variables.keys():
        raise RecordError(f"chat_template_kwargs.{min(taken)}", "is given otherwise")
    given = {key: _tools(record[key], key) for key in _filled(record, ("tools", "functions"))}
    tools = _agreed({field: tools for field, tools in given.items() if tools})
    return variables | ({"tools": tools} if tools else {})


def _tools(value: Any, field: str) -> list[dict[str, Any]]:
    tools = _from_json(value, field)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(field, f"is {quoted(tools)}, not a list of tools")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _from_json(value: Any, field: str) -> Any:
    """Parses a text as JSON; returns anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = from_json(value)
    except (ValueError, RecursionError):
        return value
    if twice := field_twice(found):
        raise RecordError(field, f"has {twice} twice, and the two say different things")
    return found


_REFUSED = ("refusal", "audio", "train_detail", "training_detail")
_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", *MARKS, *_REFUSED),
}


def _message(raw: Any, field: str) -> Message:
    """A message in OpenAI's form, from that or from ShareGPT's."""
    if not isinstance(raw, dict):
        raise RecordError(field, f"is {quoted(raw)}, not a message")
    if refused := _filled(raw, _REFUSED):
        raise RecordError(f"{field}.{refused[0]}", "cannot be honoured")
    raw = {key: value for key, value in raw.items() if value is not None or key == "content"}
    role = _role(raw, field)
    called = str(raw.get("from")).replace("-", "_") in _CALLS
    name = "value" if raw.get("content") is None and "value" in raw else "content"
    if name == "content" and raw.get("value", raw.get("content")) != raw.get("content"):
        texts = {key: _content(raw, key, field) for key in ("content", "value")}
        _agreed(texts, f"{field}.")
    calls = _calls(raw, field, name if called else "")
    wordless = calls and (called or raw.get(name) is None)
    return (
        {"role": role, "content": None if wordless else _content(raw, name, field)}
        | {key: value for key, value in raw.items() if key not in _READ}
        | ({"tool_calls": calls} if calls else {})
        | _weight(raw, field, role)
    )


def _role(raw: dict[str, Any], field: str) -> str:
    said = {}
    for key in (key for key in _ROLES if key in raw):
        name = raw[key].replace("-", "_") if isinstance(raw[key], str) else ""
        if name not in _ROLES[key]:
            known = ", ".join(_SHOWN[key])
            raise RecordError(f"{field}.{key}", f"is {quoted(raw[key])}; known are {known}")
        said[key] = _ROLES[key][name]
    if not said:
        raise RecordError(field, f"{keys_of(raw)}; role and content are needed")
    return _agreed(said, f"{field}.")


def _content(raw: dict[str, Any], key: str, field: str) -> str:
    content = raw.get(key)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        missing = "is missing" if key not in raw else "is null"
        what = missing if content is None else f"is {quoted(content)}, not a text"
        raise RecordError(f"{field}.{key}", what)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in (None, "text") or not isinstance(text, str):
            raise RecordError(f"{field}.{key}[{i}]", f"is {quoted(kind or part)}, not a text")
        texts.append(text)
    return "".join(texts)


def _calls(raw: dict[str, Any], field: str, spoken: str) -> list[dict[str, Any]]:
    """The calls of tools in a message; their arguments as templates expect them: objects.

    `spoken`: the field whose content is a call, as ShareGPT's role says; "" for none.
    """
    given = {key: raw[key] for key in _filled(raw, ("tool_calls", "function_call"))}
    if "function_call" in given:
        given["function_call"] = [given["function_call"]]
    if not isinstance(given.get("tool_calls", []), list):
        what = f"is {quoted(given['tool_calls'])}, not a list of calls"
        raise RecordError(f"{field}.tool_calls", what)
    if spoken and raw.get(spoken) is not None:
        found = _from_json(raw[spoken], f"{field}.{spoken}")
        given[spoken] = found if isinstance(found, list) else [found]
    calls = {key: [_call(c, f"{field}.{key}") for c in value] for key, value in given.items()}
    _agreed({k: [call["function"] for call in v] for k, v in calls.items()}, f"{field}.")
    return next(iter(calls.values()), [])


def _call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(field, f"{quoted(call)} is no call: it has no function with a name")
    arguments = _from_json(function.get("arguments"), f"{field}.arguments")
    function = function | ({"arguments": arguments} if isinstance(arguments, dict) else {})
    beside = call if "function" in call else {"type": "function"}
    return beside | {"function": function}


def _weight(raw: dict[str, Any], field: str, role: str) -> dict[str, int]:
    """Whether an answer is trained on: OpenAI's weight, axolotl's train, and other names for it."""
    found = {}
    for key in (key for key in MARKS if key in raw):
        value, place = raw[key], f"{field}.{key}"
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RecordError(place, f"is {quoted(value)}; a weight is 0 (not trained on) or 1")
        if key == "mask" and not isinstance(value, bool):  # 1: either masked, or a loss mask's 1
            raise RecordError(place, f"is {value}, which has two meanings; write weight, 0 or 1")
        found[key] = bool(value) == MARKS[key]
        if found[key] and role != "assistant":
            raise RecordError(place, f"is {value} on {role}; answers alone are trained on")
    return {"weight": int(_agreed(found, f"{field}."))} if found else {}
