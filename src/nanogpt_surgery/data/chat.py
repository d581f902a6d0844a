"""From the messages of a conversation to the text, and the ids, that a model was trained on.

A model's own template is rendered in a sandbox, in a process of its own (`template_worker.py`); a
model without one gets ours: ChatML where its vocabulary has ChatML's tokens, plain names else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nanogpt_surgery.data.token_offsets import encode_with_offsets
from nanogpt_surgery.data.tokenizer import Tokenizer, prompt_ids, stop_ids
from nanogpt_surgery.errors import SurgeryError, SurgeryWarning

Message: TypeAlias = dict[str, str]  # role and content
Render: TypeAlias = tuple[Sequence[Message], bool]  # and whether the text asks for an answer

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 20  # characters of one conversation
_END = "<|im_end|>"  # ChatML's
_WORKER = Path(__file__).with_name("template_worker.py")


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

    @property
    def name(self) -> str:
        """The name of one of ours, or "the model's own"."""
        return self.source if self.source in OWN else "the model's own"

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
        return self.render_many([(messages, ask)])[0]

    def render_many(self, renders: Sequence[Render]) -> list[str]:
        """The texts of several conversations."""
        for messages, _ in renders:
            check_messages(messages)
        if self.source in OWN:
            write = OWN[self.source]
            return [write(messages, ask, self.eos_token) for messages, ask in renders]
        variables = [
            {
                "messages": list(messages),
                "add_generation_prompt": ask,
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "tools": None,
                "documents": None,
            }
            for messages, ask in renders
        ]
        return self._in_the_sandbox(variables)

    def _in_the_sandbox(self, variables: list[dict[str, Any]]) -> list[str]:
        job = {
            "template": self.source,
            "renders": variables,
            "longest": LONGEST,
            "seconds": self.seconds,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_WORKER)],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=self.seconds + 10,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise self._failed(f"it took longer than {self.seconds} seconds") from None
        if done.returncode:
            raise self._failed(f"it was stopped after {self.seconds} seconds or for its memory")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise self._failed(answer["error"])
        texts: list[str] = answer["texts"]
        return texts

    def _failed(self, reason: str) -> SurgeryError:
        return SurgeryError(
            f"the model's chat template fails: {reason}",
            "check the roles and their order, or use a template of ours: chatml or plain",
        )


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The template that a tokenizer's model expects."""
    token_of: Callable[[int | None], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    bos = token_of(getattr(tokenizer, "bos_id", None)) or ""
    eos = token_of(getattr(tokenizer, "eos_id", None)) or ""
    source = getattr(tokenizer, "chat_template", None)
    if source is None:
        id_of: Callable[[str], int | None] = getattr(tokenizer, "id_of", lambda _: None)
        source = "plain" if id_of("<|im_start|>") is None else "chatml"
    return ChatTemplate(source, bos, eos)


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
    """Say so if a text begins with BOS twice."""
    bos = getattr(tokenizer, "bos_id", None)
    if bos is not None and list(ids[:2]) == [bos, bos]:
        warnings.warn(
            "the conversation begins with BOS twice: template and messages both write it",
            SurgeryWarning,
            stacklevel=3,
        )


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `SurgeryError` unless every message has a role and a content (all problems at once)."""
    problems = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            problems.append(f"message {i + 1} has no text under 'content'")
        elif message.get("role") not in ROLES:
            problems.append(f"message {i + 1} has the role {message.get('role')!r}")
    if problems:
        raise SurgeryError("; ".join(problems[:8]), f"roles are {', '.join(ROLES)}")


def _chatml(messages: Sequence[Message], ask: bool, _end: str) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}{_END}\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if ask else "")


def _plain(messages: Sequence[Message], ask: bool, end: str) -> str:
    ends = {"assistant": end}  # so that a model trained on answers learns to stop
    turns = [
        f"{m['role'].capitalize()}:\n{m['content']}{ends.get(m['role'], '')}\n\n" for m in messages
    ]
    return "".join(turns) + ("Assistant:\n" if ask else "")


def _none(messages: Sequence[Message], ask: bool, end: str) -> str:
    return "".join(m["content"] for m in messages)


OWN: dict[str, Callable[[Sequence[Message], bool, str], str]] = {
    "chatml": _chatml,
    "plain": _plain,
    "none": _none,
}
