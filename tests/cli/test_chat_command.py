"""A conversation as a user has it: lines on standard input, answers on standard output."""

import fcntl
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.chats import FEW, continued, flat
from helpers.commands import called, surgery, write_model

from nanogpt_surgery import (
    CharacterTokenizer,
    SimpleGPT,
    generate,
    open_model,
    read_conversations,
    save_model,
)
from nanogpt_surgery.cli import chat as session
from nanogpt_surgery.errors import printable
from nanogpt_surgery.generation.conversation import Conversation


def test_a_conversation_through_a_pipe(folder: Path) -> None:
    done = surgery("chat", "m", *FEW, input="abc\n/reset\nabc\n/exit\nnot heard\n", cwd=folder)
    expected = [continued(folder, "abc", seed) for seed in (3, 4)]
    assert done.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "what you type is continued" in done.stderr
    assert "nothing has been said" in done.stderr


def test_history_undo_retry_and_reset(folder: Path, talk) -> None:
    fixed = "/set seed 3\n"
    out, errors = talk(f"abc\n{fixed}def\n/undo\n{fixed}def\n{fixed}/retry\n/reset\n{fixed}abc\n")
    first = continued(folder, "abc")
    second = continued(folder, f"abc{first}def")
    assert flat(out) == "\n".join([first, second, second, second, first])
    assert "taken back: def" in errors


def test_a_line_with_two_slashes_is_said(folder: Path, talk) -> None:
    out, _ = talk("//set\n")
    assert flat(out) == continued(folder, "/set")


def test_the_system_prompt_comes_first_and_can_be_changed(folder: Path, talk) -> None:
    out, _ = talk("abc\n/reset\n/system xyz\n/set seed 3\nabc\n", "--system", "Be")
    assert flat(out) == continued(folder, "Beabc") + "\n" + continued(folder, "xyzabc")


def test_adapters_are_switched_and_blended_in_mid_conversation(folder: Path, talk) -> None:
    adapters = ["--adapter", "one=first", "--adapter", "second"]
    anew = "/reset\n/set seed 3\nabc\n"
    lines = f"abc\n/adapter second\n{anew}/base\n{anew}/blend one=0.5 second=-1\n{anew}"
    out, errors = talk(f"{lines}/adapter one 1\n{anew}/adapters\n", *adapters)
    answers = flat(out)
    base = continued(folder, "abc")
    one = called("generate", "m", "--adapter", "first", "--prompt", "abc", *FEW[:4])[0][3:-1]
    two = called("generate", "m", "--adapter", "second", "--prompt", "abc", *FEW[:4])[0][3:-1]
    assert len({one, two, base}) == 3
    assert answers.startswith("\n".join([one, two, base]) + "\n")
    assert answers.endswith("\n" + one)
    assert answers != "\n".join([one, two, base, base, one])
    assert "  one: weight 0.5\n  second: weight -1\n" in errors
    assert errors.endswith("  one: weight 1\n  second: waits\n")


def test_a_switch_in_mid_conversation_equals_a_conversation_anew(folder: Path, talk) -> None:
    """Keys and values of the adapter before must not be used again."""
    adapters = ["--adapter", "one=first", "--adapter", "two=second"]
    out, _ = talk("abc\n/save s.json\n/adapter two\n/set seed 3\ndef\n", *adapters)
    (folder / "copy.json").write_bytes((folder / "s.json").read_bytes())
    (folder / "s.json").unlink()
    anew, _ = talk("/adapter two\n/load copy.json\ndef\n", *adapters)
    assert out[-1] == anew[-1]
    other, _ = talk("/load copy.json\ndef\n", *adapters)
    assert other[-1] != anew[-1]


def test_settings_are_changed_and_bad_ones_refused(folder: Path, talk) -> None:
    out, errors = talk(
        "/set temperature 0\n/set top-k=5\n/set max_new_tokens 3\n/set top_k none\n"
        "/set temperature -1\n/set temprature 1\n/set top_p x\n/set max_new_tokens 1.5\nabc\n"
    )
    model, tokenizer = open_model(folder / "m")
    greedy = tokenizer.decode(list(generate(model, tokenizer.encode("abc"), 3, 0)))
    assert flat(out) == printable(greedy)
    for piece in (
        "  temperature 0\n",
        "  top_k 5\n",
        "temperature is -1; it must be",
        "there is no setting 'temprature'",
        "top_p is 'x', which is not a number",
        "max_new_tokens is 1.5; it must be a whole number",
    ):
        assert piece in errors
    assert "Traceback" not in errors


def test_the_largest_seed_is_set_as_it_is_written(folder: Path, talk) -> None:
    """A float would make 2^64 of it."""
    out, errors = talk(f"/set seed {2**64 - 1}\nabc\n/set\n")
    assert flat(out) == continued(folder, "abc", 2**64 - 1)
    assert errors.endswith("  seed 0\n")


def test_help_names_every_command_and_a_wrong_one_is_told_the_nearest(talk) -> None:
    _, errors = talk("/help\n/rest\n/blend one\n/adapter one\n/base\n/adapters\n\n")
    for (
        name
    ) in "help system reset undo retry adapter blend base adapters set save load exit".split():
        assert f"  /{name}" in errors
    for piece in ("/rest", "/reset?", "/blend formal=0.7", "--adapter NAME=FOLDER"):
        assert piece in errors
    assert "Traceback" not in errors


def test_what_no_longer_fits_is_said_and_a_message_too_long_refused(folder: Path, talk) -> None:
    out, errors = talk("a" * 100 + "\n" + "b" * 100 + "\n" + "c" * 300 + "\n")
    forgotten, refused = errors.index("2 messages"), errors.index("300 tokens")
    assert "200 tokens" in errors[forgotten:refused]
    first = continued(folder, "a" * 100)
    assert out == [*first.split("\n"), *continued(folder, "b" * 100, seed=4).split("\n")]


def test_a_model_without_a_template_is_talked_to_in_plain_and_says_so(folder: Path, talk) -> None:
    out, errors = talk("abc\n", few=FEW[:4])
    assert flat(out) == continued(folder, "User:\nabc\n\nAssistant:\n")
    assert "no chat template" in errors
    assert '"User:"' in errors


def test_a_vocabulary_without_names_and_colons_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one character is ESC, which must not reach the terminal as it is."""
    save_model(SimpleGPT(1, 8, 2, 1, 30), tmp_path / "m", CharacterTokenizer("\x1b"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\x1b\n"), encoding="utf-8"))
    out, errors = called("chat", tmp_path / "m", *FEW[:4])
    assert out == "\\u001b" * 8 + "\n"
    assert "\x1b" not in errors
    assert "what you type is continued" in errors


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["nowhere"], ["nowhere", "no such folder"]),
        (["m", "--adapter", "a=nowhere"], ["nowhere"]),
        (
            ["m", "--adapter", "a=first", "--adapter", "a=second"],
            ["two adapters have the name 'a'"],
        ),
        (["m", "--adapter", "first.v1"], ["the name 'first.v1'", "--adapter first-v1=first.v1"]),
        (["m", "--temperature", "-1"], ["temperature is -1"]),
        (["m", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["m", "--stop", ""], ["a stop string is empty"]),
    ],
)
def test_errors_are_sentences(folder: Path, monkeypatch, arguments, pieces) -> None:
    monkeypatch.chdir(folder)
    out, errors = called("chat", *arguments, check=1)
    for piece in pieces:
        assert piece in errors
    assert out == ""


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    write_model(tmp_path / "m", block_size=8192)
    command = [sys.executable, "-m", "nanogpt_surgery", "chat", "m", "--max-new-tokens", "8000"]
    process = subprocess.Popen(
        [*command, "--template", "none", "--seed", "1"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # With so small a pipe an answer that is not read cannot end before it is stopped.
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    begun = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(b"/set max_new_tokens 4\ndef\n/exit\n", timeout=600)
    assert process.returncode == 0, errors.decode()
    assert b"stopped; what was said so far is kept" in errors
    assert len(begun + rest) < 7000, "the answer would have 8,000 characters"
    assert b"Traceback" not in errors


def test_ctrl_c_at_any_moment_keeps_the_conversation(folder: Path, talk, monkeypatch) -> None:
    def interrupt_once(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def first(*arguments: object) -> object:
            monkeypatch.setattr(owner, name, function)
            signal.raise_signal(signal.SIGINT)
            return function(*arguments)

        monkeypatch.setattr(owner, name, first)

    interrupt_once(Conversation, "_fitting")
    out, errors = talk("abc\n/save one.json\n")
    assert "stopped; what was said so far is kept" in errors
    [messages] = read_conversations(folder / "one.json")
    assert len(messages[1]["content"]) == 1
    interrupt_once(session, "write_json")
    out, errors = talk("abc\n/save two.json\n/save two.json\n")
    assert "stopped at once" in errors
    assert "wrote two.json" in errors
    assert flat(out) == continued(folder, "abc")


def test_an_answer_that_nobody_reads_ends_the_program(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nanogpt_surgery", "chat", "m", *map(str, FEW)]
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            command, input=b"abc\ndef\n", stdout=closed, stderr=subprocess.PIPE, cwd=folder
        )
    assert done.returncode == 141, done.stderr.decode()
    assert b"Broken pipe" not in done.stderr


def test_a_folder_with_an_equals_sign_is_a_folder(folder: Path, talk) -> None:
    (folder / "lr=1e-3").mkdir()
    (folder / "first").rename(folder / "lr=1e-3" / "first")
    try:
        _, errors = talk("/adapters\n", "--adapter", "lr=1e-3/first", "--adapter", "b=second")
    finally:
        (folder / "lr=1e-3" / "first").rename(folder / "first")
    assert "  first: weight 1\n  b: waits\n" in errors
