"""The files of a conversation in `surgery chat`: /save writes one, /load reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import write_json

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import Message


def save_conversation(path: Path, record: dict[str, Any]) -> None:
    """Write a record into a new file, in one rename.

    Raises:
        SurgeryError: there is a file of this name.
    """
    if path.exists():
        raise SurgeryError(f"{path} exists", "choose a new name")
    write_json(path, [record])


def load_conversation(path: Path) -> list[Message]:
    """Returns the messages of a file that holds one conversation, in which the model spoke last.

    Raises:
        SurgeryError: it does not.
    """
    from nanogpt_surgery.data.conversations.instructions import read_conversations

    return _one_to_go_on_with(path, read_conversations(path))


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
