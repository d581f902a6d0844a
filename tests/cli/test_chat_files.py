"""/save and /load: nothing is lost by either."""

import json
from pathlib import Path

import pytest
from helpers.chats import flat

from nanogpt_surgery import read_conversations
from nanogpt_surgery.cli.chat.files import ChatFiles
from nanogpt_surgery.errors import printable


def test_a_conversation_is_saved_as_instruction_data_and_gone_on_with(folder: Path, talk) -> None:
    out, errors = talk(
        "abc\n/save talk.json\n/save talk.json\n/set seed 3\ndef\n", "--system", "Be"
    )
    [messages] = read_conversations(folder / "talk.json")
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert errors.count("wrote talk.json") == 2
    again, _ = talk("/load talk.json\ndef\n")
    assert flat(again) == flat(out)[len(flat(out)) - len(flat(again)) :]
    assert len(flat(again)) > 3


def test_nothing_is_lost_by_save_or_load(folder: Path, talk) -> None:
    (folder / "diary.txt").write_text("mine")
    (folder / "question.json").write_text('[{"messages": [{"role": "user", "content": "?"}]}]')
    out, errors = talk(
        "abc\n/save diary.txt\n/load diary.txt\n/load question.json\n/save\n/save no/where.json\n"
        "/reset\n/save new.json\n"
    )
    assert (folder / "diary.txt").read_text() == "mine"
    for piece in (
        "diary.txt exists and is not of this conversation",
        "diary.txt, line 1, is not JSON",
        "question.json holds one that ends in a question",
        "/save needs a file",
        "where.json",
        "nothing has been said that could be saved",
    ):
        assert piece in errors
    assert "Traceback" not in errors
    assert len(flat(out)) >= 8


def test_a_retry_that_is_refused_loses_nothing(folder: Path, talk) -> None:
    out, errors = talk(f"abc\n/system {'x' * 300}\n/retry\n/system\n/save kept.json\n")
    assert "the message has 303 tokens" in errors
    [messages] = read_conversations(folder / "kept.json")
    assert [m["content"] for m in messages[:1]] == ["abc"]
    assert printable(messages[1]["content"]) == flat(out)


ANSWER = {"role": "assistant", "content": "hello"}
ASKED = [{"role": "user", "content": "q"}, ANSWER]


def write(path: Path, *records: object) -> bytes:
    path.write_text(json.dumps(records))
    return path.read_bytes()


def test_what_load_cannot_go_on_with_is_said(folder: Path, talk) -> None:
    write(folder / "empty.json", {"messages": []})
    write(folder / "alone.json", {"messages": [ANSWER]})
    write(folder / "two.json", {"messages": ASKED}, {"messages": ASKED})
    _, errors = talk("/load empty.json\n/load alone.json\n/load two.json\n/undo\n/exit\n")
    assert "empty.json is not instruction data: record 1, messages: is an empty list" in errors
    assert "alone.json holds one in which no user says anything" in errors
    assert "two.json holds 2 conversations" in errors
    assert "nothing has been said that could be taken back" in errors


def test_a_conversation_that_was_loaded_is_saved_where_it_lay(folder: Path, talk) -> None:
    (folder / "link.json").symlink_to("lain.json")
    write(folder / "lain.json", {"messages": ASKED, "adapters": {}})
    out, errors = talk("/load lain.json\nabc\n/save link.json\n/save lain.json\n")
    assert errors.count("wrote ") == 2
    assert (folder / "link.json").is_symlink()
    [messages] = read_conversations(folder / "lain.json")
    assert messages[:3] == [*ASKED, {"role": "user", "content": "abc"}]
    assert printable(messages[3]["content"]) == flat(out)


@pytest.mark.parametrize(
    ("record", "lost"),
    [
        ({"messages": ASKED, "mine": 1}, "mine"),
        ({"messages": [ASKED[0] | {"name": "Ada"}, ANSWER], "id": 7}, "id, name"),
        ({"prompt": "q", "completion": "hello"}, "completion, prompt"),
        ({"messages": ASKED, "settings": {"top_k": 3}}, "settings"),
        ({"messages": ASKED, "adapters": {"first": 0.5}, "settings": 3}, "adapters, settings"),
    ],
)
def test_what_save_would_not_write_again_is_not_replaced(folder, talk, record, lost) -> None:
    before = write(folder / "rich.json", record)
    _, errors = talk("/load rich.json\n/save rich.json\n")
    assert f"holds more than the conversation, which would be lost: {lost}\n" in errors
    assert (folder / "rich.json").read_bytes() == before


def test_what_load_does_not_take_over_is_not_replaced(folder: Path, talk) -> None:
    """The adapters and settings of a saved conversation, unless they are those of now."""
    talk("abc\n/save own.json\n", "--adapter", "first")
    before = (folder / "own.json").read_bytes()
    _, errors = talk("/load own.json\ndef\n/save own.json\n")
    assert "which would be lost: adapters\n" in errors
    _, errors = talk("/load own.json\n/set top_k 3\n/save own.json\n", "--adapter", "first")
    assert "which would be lost: settings\n" in errors
    assert (folder / "own.json").read_bytes() == before
    _, errors = talk("/load own.json\ndef\n/save own.json\n", "--adapter", "first")
    assert "wrote own.json" in errors


def test_a_file_of_another_conversation_is_not_replaced(folder: Path, talk) -> None:
    before = {name: write(folder / name, {"messages": ASKED}) for name in ("1.json", "2.json")}
    _, errors = talk("/load 1.json\n/load 2.json\n/save 1.json\n/reset\nabc\n/save 2.json\n")
    for name, contents in before.items():
        assert f"{name} exists and is not of this conversation" in errors
        assert (folder / name).read_bytes() == contents


def test_what_another_program_changed_meanwhile_is_not_replaced(folder, talk, monkeypatch) -> None:
    write(folder / "shared.json", {"messages": ASKED})
    load = ChatFiles.load

    def and_then_changed(self, path):
        messages = load(self, path)
        write(path, {"messages": [*ASKED, *ASKED]})
        return messages

    monkeypatch.setattr(ChatFiles, "load", and_then_changed)
    _, errors = talk("/load shared.json\n/save shared.json\n")
    assert "shared.json exists and was changed since by another program" in errors
    assert len(read_conversations(folder / "shared.json")[0]) == 4
