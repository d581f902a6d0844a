"""From the messages of a conversation to the text, and the ids, that a model was trained on.

A model's own template is rendered in a sandbox, in a process of its own (`template_worker.py`); a
model without one gets ours: ChatML where its vocabulary has ChatML's tokens, plain names else.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeAlias

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.text.processes import cores
from nanogpt_surgery.data.tokenizers.token_text import encode_with_offsets
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids, stop_ids
from nanogpt_surgery.errors import SurgeryError, quoted, warn

Message: TypeAlias = dict[str, Any]  # role and content, and what else a template may write

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 20  # characters of one conversation
_END = "<|im_end|>"  # ChatML's
MEND_TEMPLATE = "check the roles and their order, or use a template of ours: chatml or plain"
# Fields of an answer that say whether it is trained on; by their names, or the other way round.
TRAINED = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask")
MASKED = ("masked", "mask")

_WORKER = Path(__file__).with_name("template_worker.py")
_FOR_ONE = 200  # conversations for which a second process is not worth its start
_GRACE = 10  # seconds beyond the limit of one rendering, which the process keeps itself


class Messages(list[Message]):
    """The messages of a conversation, and what belongs to it as a whole.

    Attributes:
        variables: what a template is given beside the messages: tools, and what a record says.
        where: the file and the number of the record, for errors.
        fields: for each message, the field of the record that it was made from.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        where: str = "",
        fields: Sequence[str] = (),
    ):
        super().__init__(messages)
        self.variables, self.where = dict(variables or {}), where
        self.fields = list(fields) or [f"message {i + 1}" for i in range(len(self))]


@dataclass(frozen=True)
class Written:
    """The text of a conversation, and from where to where each of the asked answers stands in it.

    `error` says why there is none.
    """

    text: str = ""
    answers: Sequence[tuple[int, int]] = ()
    error: str = ""


@check_arguments
@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written.

    `source` is a template in Jinja, or the name of one of ours: "chatml", "plain", or "none", which
    writes what is said and nothing else, so that the model continues it.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    seconds: int = 10
    special_tokens: Mapping[str, str] | None = None
    """what a template's variables for special tokens hold; None: BOS and EOS"""
    owner: str = "model"
    """whose files it comes from: the model's or the adapter's"""

    @property
    def name(self) -> str:
        """The name of one of ours, or "the model's own"."""
        return self.source if self.source in OWN else f"the {self.owner}'s own"

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer where no token does: the next speaker's name, or ChatML's end.

        A base model's `stop_ids` are often without that end, also where its own template writes it.
        """
        if self.source == "plain":
            return ("\n\nUser:", "\nUser:")
        return (_END,) if self.source == "chatml" or _END in self.source else ()

    def render(self, messages: Sequence[Message], ask: bool = True) -> str:
        """The text of a conversation; `ask`: up to where an answer begins.

        Raises:
            SurgeryError: the messages are none, or the template fails or goes beyond its limits.
        """
        check_messages(messages)
        [written] = self.write([messages], ask=ask)
        if written.error:
            what = f"the {self.owner}'s chat template fails: {written.error}"
            raise SurgeryError(what, MEND_TEMPLATE)
        return written.text

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[Sequence[int]] | None = None,
        ask: bool = False,
    ) -> Iterator[Written]:
        """The texts of conversations, as they come; they end with one that had to be stopped.

        Args:
            conversations: messages that `check_messages` lets pass.
            answers: for each, which messages are answers that are to be found in the text.
            ask: where no answers are to be found, write up to where one begins.
        """
        wanted = answers or [()] * len(conversations)
        if self.source in OWN:
            for messages, found in zip(conversations, wanted, strict=True):
                yield self._own(messages, found, ask)
            return
        special = self.special_tokens
        if special is None:
            special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        job = {
            "template": self.source,
            "variables": {**special, "tools": None, "documents": None},
            "longest": LONGEST,
            "seconds": self.seconds,
        }
        asked = [
            {"messages": [shown(m) for m in messages], "ask": ask, "answers": list(found)}
            | {"variables": getattr(messages, "variables", {})}
            for messages, found in zip(conversations, wanted, strict=True)
        ]
        for reply in replies(job, asked):
            spans = [(start, end) for start, end in reply.get("answers", ())]
            yield Written(reply.get("text", ""), spans, reply.get("error", ""))

    def _own(self, messages: Sequence[Message], answers: Sequence[int], ask: bool) -> Written:
        text, spans = "", []
        for i, message in enumerate(messages):
            said = message["content"] or ""  # a call of tools has none
            before, after = OWN[self.source](message["role"], said, self.eos_token)
            start = len(text) + len(before)
            text += before + after
            if i in answers:
                spans.append((start, len(text)))
        begin = OWN[self.source]("assistant", "", "")[0] if ask else ""
        return Written(text + begin, spans)


def shown(message: Message) -> Message:
    """A message as a template is given it."""
    return {key: value for key, value in message.items() if key not in TRAINED + MASKED}


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The template that a tokenizer's model expects."""
    token_of: Callable[[int | None], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    bos = token_of(getattr(tokenizer, "bos_id", None)) or ""
    eos = token_of(getattr(tokenizer, "eos_id", None)) or ""
    source = getattr(tokenizer, "chat_template", None)
    if source is None:
        id_of: Callable[[str], int | None] = getattr(tokenizer, "id_of", lambda _: None)
        source = "plain" if id_of("<|im_start|>") is None else "chatml"
    special = getattr(tokenizer, "special_tokens", None)
    return _by_name(ChatTemplate(source, bos, eos, special_tokens=special), tokenizer)


def named_template(tokenizer: Tokenizer, name: str) -> ChatTemplate:
    """The template of this name: "model" is the one that the tokenizer's model expects."""
    found = template_of(tokenizer)
    return found if name == "model" else replace(found, source=name)


def to_jinja(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """A template as transformers renders it, to the same ids with this tokenizer."""
    if template.source not in _JINJA:
        return template.source
    token_of: Callable[[int], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    begin = "".join(token_of(i) or "" for i in prompt_ids(tokenizer, ""))
    return _JINJA[template.source].format(begin=repr(begin), end=repr(template.eos_token))


def template_from_jinja(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    """The template that lies beside an adapter."""
    return _by_name(replace(template_of(tokenizer), source=text, owner="adapter"), tokenizer)


def _by_name(template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """A template under its name, and so with its stops, if `to_jinja` made it of one of ours."""
    ours = (replace(template, source=name) for name in _JINJA)
    known = (one for one in ours if to_jinja(one, tokenizer) == template.source)
    return next(known, template)


@check_arguments
def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], template: ChatTemplate | None = None
) -> list[int]:
    """The ids of a conversation up to where the model's answer begins; BOS comes once."""
    template = template or template_of(tokenizer)
    ids, _ = encode_conversation(tokenizer, template, template.render(messages))
    warn_of_two_bos(tokenizer, ids)
    return ids


def encode_conversation(
    tokenizer: Tokenizer, template: ChatTemplate, text: str
) -> tuple[list[int], list[int]]:
    """The ids of a text that a template wrote, and where in it each token begins.

    The text, from the beginning of a conversation, is encoded as a whole. A model's own template
    writes every special token itself; before ours comes what the tokenizer puts before a text
    (BOS). Training, preview, chat and evaluation all ask here.
    """
    ids, offsets = encode_with_offsets(tokenizer, text)
    before = prompt_ids(tokenizer, "") if template.source in OWN else []
    if ids[: len(before)] == before:
        return ids, offsets
    return before + ids, [0] * len(before) + offsets


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a turn: the tokenizer's own, and ChatML's end where it has it."""
    id_of: Callable[[str], int | None] = getattr(tokenizer, "id_of", lambda _: None)
    end = id_of(_END)
    return stop_ids(tokenizer) | (set() if end is None else {end})


def warn_of_two_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """Warns if a text begins with BOS twice."""
    bos = getattr(tokenizer, "bos_id", None)
    if bos is not None and list(ids[:2]) == [bos, bos]:
        warn("the conversation begins with BOS twice: template and messages both write it")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `SurgeryError`, with all problems, unless every message has a role and a content."""
    problems = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role is None or not (isinstance(message.get("content"), str) or _only_calls(message)):
            problems.append(f"message {i + 1} has no text under 'content'")
        elif role not in ROLES:
            problems.append(f"message {i + 1} has the role {quoted(role)}")
    if problems:
        raise SurgeryError("; ".join(problems[:8]), f"roles are {', '.join(ROLES)}")


def _only_calls(message: Message) -> bool:
    """Whether a message has no text because it calls tools."""
    return bool(message.get("tool_calls")) and message.get("content") is None


# A message as what stands before it, and what is said with what ends it: role, text and EOS → both.
# EOS stands behind an answer alone, so that a model trained on answers learns to stop.
OWN: dict[str, Callable[[str, str, str], tuple[str, str]]] = {
    "chatml": lambda role, said, _: (f"<|im_start|>{role}\n", f"{said}{_END}\n"),
    "plain": lambda role, said, eos: (
        f"{role.capitalize()}:\n",
        f"{said}{eos if role == 'assistant' else ''}\n\n",
    ),
    "none": lambda role, said, _: ("", said),
}


# The same, for transformers, with the texts that stand before a conversation and end an answer.
_JINJA = {
    "chatml": (
        "{{{{ {begin} }}}}{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\\n' + "
        "(m['content'] or '') + '<|im_end|>\\n' }}}}{{% endfor %}}"
        "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
    ),
    "plain": (
        "{{{{ {begin} }}}}{{% for m in messages %}}{{{{ m['role']|capitalize + ':\\n' + "
        "(m['content'] or '') + ({end} if m['role'] == 'assistant' else '') + '\\n\\n' }}}}"
        "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'Assistant:\\n' }}}}{{% endif %}}"
    ),
}


def replies(job: dict[str, Any], asked: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the reply of `template_worker.py` to each conversation, in several processes.

    The job is the template, and what holds for all of its renderings. The last reply is an error
    where a process had to be ended; no more come then.
    """
    count = max(1, min(cores(), len(asked) // _FOR_ONE))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(TemplateProcess(job, asked[first::count])) for first in range(count)
        ]
        for number in range(len(asked)):
            reply = workers[number % count].reply()
            if reply is None:
                yield {"error": f"it was stopped after {job['seconds']} seconds or for its memory"}
                return
            yield reply


class TemplateProcess:
    """One process; as a context it is ended, whatever it is doing."""

    def __init__(self, job: dict[str, Any], asked: Sequence[dict[str, Any]]):
        self.patience = job["seconds"] + _GRACE
        command = [sys.executable, "-I", str(_WORKER)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True, encoding="utf-8"
        )
        self._waiting_since = math.inf
        threading.Thread(target=self._feed, args=([job, *asked],), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def reply(self) -> dict[str, Any] | None:
        """The next one; none if the process ended, or took longer than it may."""
        assert self._process.stdout is not None
        self._waiting_since = monotonic()
        line = self._process.stdout.readline()
        self._waiting_since = math.inf
        return json.loads(line) if line.endswith("\n") else None

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _feed(self, asked: Sequence[dict[str, Any]]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError), self._process.stdin as pipe:  # it was ended
            for one in asked:
                pipe.write(json.dumps(one) + "\n")

    def _watch(self) -> None:
        while self._process.poll() is None:
            if monotonic() - self._waiting_since > self.patience:
                self._process.kill()
            sleep(0.5)
