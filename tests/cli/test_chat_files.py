"""/save and /load: nothing is lost by either."""

import json
from pathlib import Path

from helpers.chats import flat

from nanogpt_surgery import read_conversations
from nanogpt_surgery.errors import printable


def test_a_conversation_is_saved_as_instruction_data_and_gone_on_with(folder: Path, talk) -> None:
    out, errors = talk("abc\n/save talk.json\n/set seed 3\ndef\n", "--system", "Be")
    [messages] = read_conversations(folder / "talk.json")
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert errors.count("wrote talk.json") == 1
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
        "diary.txt exists",
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
    for pieces in (["empty.json", "record 1"], ["alone.json", "no user"], ["two.json", "2 conv"]):
        assert any(all(piece in line for piece in pieces) for line in errors.splitlines()), pieces
    assert "taken back" in errors


def test_an_answer_that_only_calls_tools_is_shown_by_their_names(folder: Path, talk) -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("weather", "clock")]
    last = {"role": "assistant", "content": None, "tool_calls": calls}
    write(folder / "calls.json", {"messages": [ASKED[0], last]})
    _, errors = talk("/load calls.json\n/exit\n")
    assert "2 messages" in errors and "weather, clock" in errors
    assert "None" not in errors


def test_a_file_that_is_there_is_not_replaced(folder: Path, talk) -> None:
    """Not the one that was loaded, nor one that was saved before, nor what a link leads to."""
    before = write(folder / "lain.json", {"messages": ASKED})
    (folder / "link.json").symlink_to("lain.json")
    _, errors = talk(
        "/load lain.json\nabc\n/save lain.json\n/save link.json\n/save new.json\n/save new.json\n"
    )
    assert (folder / "lain.json").read_bytes() == before
    for name in ("lain.json", "link.json", "new.json"):
        assert f"{name} exists" in errors
    assert errors.count("wrote ") == 1
    [messages] = read_conversations(folder / "new.json")
    assert messages[:2] == ASKED
