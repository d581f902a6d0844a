"""The files of a conversation in `surgery chat`: what /load reads, and what /save may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import write_json
from nanogpt_surgery.files.manifest import file_hash

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import Message

OF_THE_SESSION = {"adapters", "settings"}
RECORD, MESSAGE = {"messages"} | OF_THE_SESSION, {"role", "content"}


@dataclass(frozen=True)
class _Known:
    """A file as this conversation read or wrote it."""

    sha256: str
    beside: frozenset[str] = frozenset()
    """what it holds that /save would not write again"""
    read: Mapping[str, Any] = field(default_factory=dict)
    """the record as /load read it, which leaves the session's adapters and settings as they are"""

    def lost(self, record: Mapping[str, Any]) -> str:
        """Says in words which of it would be gone, were a record written over it."""
        other = {k for k in OF_THE_SESSION if self.read.get(k, record[k]) != record[k]}
        return ", ".join(sorted(self.beside | other))


class ChatFiles:
    """The files that hold the conversation that is going on: no others are replaced."""

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}

    def forget(self) -> None:
        """Another conversation begins, which no file holds."""
        self._known = {}

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write the conversation in one rename, behind a link where there is one.

        Raises:
            SurgeryError: the file is there, and something in it would be lost.
        """
        goal = path.resolve()
        if goal.exists():
            self._check_loss(path, goal, record)
        write_json(goal, [record])
        self._known[goal] = _Known(file_hash(goal))

    def _check_loss(self, path: Path, goal: Path, record: dict[str, Any]) -> None:
        known = self._known.get(goal)
        if known is None:
            what = "is not of this conversation"
        elif lost := known.lost(record):
            what = f"holds more than the conversation, which would be lost: {lost}"
        elif not goal.is_file() or file_hash(goal) != known.sha256:
            what = "was changed since by another program"
        else:
            return
        raise SurgeryError(f"{path} exists and {what}", "choose a new name")

    def load(self, path: Path) -> list[Message]:
        """The messages of a file that holds one conversation, in which the model spoke last.

        Raises:
            SurgeryError: it does not. The conversation that was going on goes on.
        """
        from nanogpt_surgery.data.conversations.instructions import read_conversations
        from nanogpt_surgery.data.conversations.record_files import read_records

        sha256 = file_hash(path) if path.is_file() else ""  # first: it may change in the meantime
        messages = _one_to_go_on_with(path, read_conversations(path))
        [record] = read_records(path)
        more = [set(record) - RECORD, *(set(message) - MESSAGE for message in messages)]
        self._known = {path.resolve(): _Known(sha256, frozenset().union(*more), record)}
        return messages


def _one_to_go_on_with(path: Path, found: Sequence[list[Message]]) -> list[Message]:
    from nanogpt_surgery.data.conversations.chat import check_messages

    check_messages(found[0])
    roles = [message["role"] for message in found[0]]
    if len(found) != 1:
        what = f"{len(found)} conversations"
    elif "user" not in roles:
        what = "one in which no user says anything"
    elif roles[-1] != "assistant":
        what = "one that ends in a question"
    else:
        return found[0]
    raise SurgeryError(f"{path} holds {what}, not one that can be gone on with")


def file_named(rest: str, command: str) -> Path:
    """The path that was typed after a command.

    Raises:
        SurgeryError: there is none.
    """
    if not rest:
        raise SurgeryError(f"{command} needs a file", f"{command} talk.json")
    return Path(rest).expanduser()
