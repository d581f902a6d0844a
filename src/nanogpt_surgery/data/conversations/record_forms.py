"""Records of the common forms of instruction data as conversations; no field goes in silence.

OpenAI's messages, ShareGPT's conversations, Alpaca's instruction, input and output (with system and
history), TRL's prompt and completion (texts or messages), and the names that other sets of data
give the same. A field that would change what is learned and cannot be honoured is an error, and so
are two fields that say the same kind of thing differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from nanogpt_surgery.data.conversations.chat import MASKED, ROLES, TRAINED, Message, Messages
from nanogpt_surgery.data.conversations.record_files import field_twice, from_json, keys_of
from nanogpt_surgery.errors import quoted

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS, INPUTS = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERS = ("completion", "answer", "response", "output")
SYSTEM = ("system", "system_prompt")
NOT_TEXT = ("images", "image", "videos", "video", "audio", "audios")
NO_EFFECT = ("adapters", "settings", "parallel_tool_calls")  # on the text
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

Said: TypeAlias = list[tuple[str, Message]]  # messages, each after the field that it was made from


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
    for field in NOT_TEXT:
        if record.get(field):
            raise RecordError(field, "is not text, and text alone is trained on")
    wanted = _check_wanted(record)
    said, used = _conversation(record) or _pair(record)
    said = [*_system(record, said[0][1]), *said]
    fields, messages = zip(*said, strict=True)
    known = KNOWN | wanted | used
    unused = [name for name, value in record.items() if name not in known and not _empty(value)]
    return Messages(messages, _variables(record), "", fields), unused


def _conversation(record: dict[str, Any]) -> tuple[Said, set[str]] | None:
    """The messages of a list of them, and the fields used; None where there is no list."""
    lists = [key for key in CONVERSATIONS if isinstance(record.get(key), list)]
    if not lists:
        return None
    filled = [key for key in lists if record[key]]
    if not filled:
        raise RecordError(lists[0], "is an empty list")
    if record.get("history"):
        raise RecordError("history", f"stands beside {filled[0]}")
    said = _agreed({key: _messages(record[key], key) for key in filled})
    return [(f"{filled[0]}[{i}]", message) for i, message in enumerate(said)], set(filled)


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
    if str(record.get("label")).lower() in ("false", "0"):
        raise RecordError("label", f"is {quoted(record['label'])}: the answer is one not to give")
    weight = record.get("weight")
    if not _empty(weight) and str(weight) not in ("1", "1.0"):
        raise RecordError("weight", f"is {quoted(weight)}; messages have weights, records none")
    yes, no = ("true", "1", "1.0"), ("false", "0", "0.0")
    meanings = [*((key, yes, no) for key in TRAINED), *((key, no, yes) for key in MASKED)]
    said = {key: str(record[key]).lower() for key, _, _ in meanings if key in record}
    for key, _, unwanted in meanings:
        if said.get(key) in unwanted:
            what = "the answer is not to be trained on; leave the record out"
            raise RecordError(key, f"is {quoted(record[key])}: {what}")
    return {key for key, wanted, _ in meanings if said.get(key) in wanted}


def _empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _pair(record: dict[str, Any]) -> tuple[Said, set[str]]:
    """The messages of a question with its answer, and the fields used."""
    asked = [key for key in QUESTIONS if not _empty(record.get(key))]
    beside = [key for key in INPUTS if not _empty(record.get(key))]
    if "query" in asked and len(asked) > 1:  # another name for Alpaca's input
        asked.remove("query")
        beside.append("query")
    if not asked and beside[:1] == ["input"]:
        asked = [beside.pop(0)]
    answers = [key for key in ANSWERS if record.get(key) is not None]
    answered = any(key in record for key in ANSWERS)
    if answered and not asked and (empty := [k for k in (*QUESTIONS, "input") if k in record]):
        raise RecordError(empty[0], "is empty; a question is needed")
    if not asked or not answered:
        raise RecordError("", keys_of(record))
    if not answers:
        field = next(key for key in ANSWERS if key in record)
        raise RecordError(field, "is empty; an answer is needed")
    question, answer = (_only_one(record, keys) for keys in (asked, answers))
    if beside:
        _only_one(record, beside)
    before, after = record[question], record[answer]
    if beside:
        before = f"{_text(before, question)}\n\n{_text(record[beside[0]], beside[0])}"
    said = _said(before, question, "user")
    if isinstance(before, list):  # TRL trains on the completion alone
        said = [m | {"weight": 0} if m["role"] == "assistant" else m for m in said]
    prompt = [(" and ".join([question, *beside]), message) for message in said]
    turns = [("history", message) for message in _history(record.get("history"))]
    begins = 1 if said[0]["role"] == "system" else 0
    replies = [(answer, message) for message in _said(after, answer, "assistant")]
    used = {*asked, *answers, *beside, "history"}  # several names of one thing say the same
    return [*prompt[:begins], *turns, *prompt[begins:], *replies], used


def _only_one(record: dict[str, Any], keys: list[str]) -> str:
    _agreed({key: record[key] for key in keys})
    return keys[0]


def _said(value: Any, field: str, role: str) -> list[Message]:
    """Returns the messages in a field: a text of a role, or a list of messages."""
    if isinstance(value, list):
        if not value:
            raise RecordError(field, "is an empty list")
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
            said.append({"role": "user", "content": _text(turn[0], f"{field}[0]")})
            said.append({"role": "assistant", "content": _text(turn[1], f"{field}[1]")})
        else:
            raise RecordError(field, f"is {quoted(turn)}, not a question with its answer")
    return said


def _system(record: dict[str, Any], first: Message) -> Said:
    """The system message that a field of the record says, unless the messages begin with it."""
    found = [key for key in SYSTEM if not _empty(record.get(key))]
    if not found:
        return []
    text = _text(record[_only_one(record, found)], found[0])
    if first["role"] != "system":
        return [("system", {"role": "system", "content": text})]
    if first["content"] != text:
        raise RecordError(found[0], "is another system prompt than the first message's")
    return []


def _variables(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables that a template is given beside the messages."""
    values = record.get("chat_template_kwargs")
    if not _empty(values) and not isinstance(values, dict):
        raise RecordError("chat_template_kwargs", f"is {quoted(values)}, not an object")
    variables = dict(values or {})
    if taken := {"messages", "tools", "add_generation_prompt"} & variables.keys():
        raise RecordError(f"chat_template_kwargs.{min(taken)}", "is given otherwise")
    given = {field: _tools(record.get(field), field) for field in ("tools", "functions")}
    given = {field: tools for field, tools in given.items() if tools}
    return variables | ({"tools": _agreed(given)} if given else {})


def _tools(value: Any, field: str) -> list[dict[str, Any]]:
    if _empty(value):
        return []
    tools = _from_json(value, field)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(field, f"is {quoted(tools)}, not a list of tools")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


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


def _message(raw: Any, field: str) -> Message:
    """A message in OpenAI's form, from that or from ShareGPT's."""
    if not isinstance(raw, dict):
        raise RecordError(field, f"is {quoted(raw)}, not a message")
    raw = {key: value for key, value in raw.items() if value is not None or key == "content"}
    role, called = _role(raw, field)
    rest = {key: value for key, value in raw.items() if key not in _READ}
    for key in ("refusal", "audio", "train_detail", "training_detail"):
        if not _empty(raw.get(key)):
            raise RecordError(f"{field}.{key}", "cannot be honoured")
    name = _content_field(raw, field)
    content = raw.get(name)
    calls = _calls(raw, field, name if called else "")
    if calls:
        rest["tool_calls"] = calls
        content = None if called else content
    if not (calls and content is None):
        content = _content(content, f"{field}.{name}", name in raw)
    weight = _weight(raw, field, role)
    return {"role": role, "content": content} | rest | weight


_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", *TRAINED, *MASKED),
    *("refusal", "audio", "train_detail", "training_detail"),
}


def _role(raw: dict[str, Any], field: str) -> tuple[str, bool]:
    """The role of a message, and whether ShareGPT's role says that it is a call of a tool."""
    given = {key: raw[key] for key in _ROLES if key in raw}
    if not given:
        raise RecordError(field, f"{keys_of(raw)}; role and content are needed")
    said = {}
    for key, name in given.items():
        given[key] = name.replace("-", "_") if isinstance(name, str) else ""
        if given[key] not in _ROLES[key]:
            known = ", ".join(_SHOWN[key])
            raise RecordError(f"{field}.{key}", f"is {quoted(name)}; known are {known}")
        said[key] = _ROLES[key][given[key]]
    return _agreed(said, f"{field}."), given.get("from") in _CALLS


def _content_field(raw: dict[str, Any], field: str) -> str:
    """The field that holds what a message says."""
    if raw.get("content") is None:
        return "value" if "value" in raw else "content"
    if "value" in raw and raw["value"] != raw["content"]:
        texts = {key: _content(raw[key], f"{field}.{key}", True) for key in ("content", "value")}
        _agreed(texts, f"{field}.")
    return "content"


def _content(content: Any, field: str, there: bool) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        what = "is missing" if not there else "is null" if content is None else ""
        raise RecordError(field, what or f"is {quoted(content)}, not a text")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in (None, "text") or not isinstance(text, str):
            raise RecordError(f"{field}[{i}]", f"is {quoted(kind or part)}, not a text")
        texts.append(text)
    return "".join(texts)


def _calls(raw: dict[str, Any], field: str, spoken: str) -> list[dict[str, Any]]:
    """The calls of tools in a message; their arguments as templates expect them: objects.

    `spoken`: the field whose content is a call, as ShareGPT's role says; "" for none.
    """
    given = {key: raw[key] for key in ("tool_calls", "function_call") if not _empty(raw.get(key))}
    if "function_call" in given:
        given["function_call"] = [given["function_call"]]
    if spoken and raw.get(spoken) is not None:
        found = _from_json(raw[spoken], f"{field}.{spoken}")
        given[spoken] = found if isinstance(found, list) else [found]
    calls = {key: _call_list(value, f"{field}.{key}") for key, value in given.items()}
    _agreed({k: [call["function"] for call in v] for k, v in calls.items()}, f"{field}.")
    return next(iter(calls.values()), [])


def _call_list(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RecordError(field, f"is {quoted(calls)}, not a list of calls")
    return [_call(call, field) for call in calls]


def _call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(field, f"{quoted(call)} is no call: it has no function with a name")
    arguments = function.get("arguments")
    parsed = _from_json(arguments, f"{field}.arguments")
    function = function | ({"arguments": parsed} if isinstance(parsed, dict) else {})
    beside = call if "function" in call else {"type": "function"}
    return beside | {"function": function}


def _weight(raw: dict[str, Any], field: str, role: str) -> dict[str, int]:
    """Whether an answer is trained on: OpenAI's weight, axolotl's train, and other names for it."""
    found = {
        key: _is_trained(raw[key], key, f"{field}.{key}")
        for key in TRAINED + MASKED
        if raw.get(key) is not None
    }
    for key, trained in found.items():
        if trained and role != "assistant":
            what = f"is {raw[key]} on {role}; answers alone are trained on"
            raise RecordError(f"{field}.{key}", what)
    return {"weight": int(_agreed(found, f"{field}."))} if found else {}


def _is_trained(value: Any, key: str, field: str) -> bool:
    if not isinstance(value, int | float) or value not in (0, 1):
        what = "a weight is 0 (not trained on) or 1"
        raise RecordError(field, f"is {quoted(value)}; {what}")
    if key == "mask" and not isinstance(value, bool):  # 1 is either masked, or a loss mask's 1
        raise RecordError(field, f"is {value}, which has two meanings; write weight, 0 or 1")
    return bool(value) != (key in MASKED)
