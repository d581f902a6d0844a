import io
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import (
    CharacterTokenizer,
    SurgeryError,
    python_reference,
    python_source,
    read_texts,
    split_by_position,
)

SHAKESPEARE = Path(__file__).parents[2] / ".." / "shared" / "data" / "tinyshakespeare.txt"


def write(path: Path, contents: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def give_stdin(monkeypatch, contents: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(contents), encoding="utf-8"))


def test_a_file_is_read_as_it_is(tmp_path):
    path = write(tmp_path / "a.txt", "één\r\ntwo\n\tthree 😀")
    assert read_texts([path]) == read_texts([str(path)]) == "één\r\ntwo\n\tthree 😀"


def test_files_follow_in_the_order_named(tmp_path):
    b, a = write(tmp_path / "b.txt", "second"), write(tmp_path / "a.txt", "first")
    assert read_texts([a, b]) == "first\nsecond"
    assert read_texts([b, a]) == "second\nfirst"


def test_a_folder_is_every_file_below_by_name(tmp_path):
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a" / "z.md", "A/Z")
    write(tmp_path / "a" / "deep" / "x.py", "A/DEEP/X")
    assert read_texts([tmp_path]) == "A/DEEP/X\nA/Z\nB"


def test_hidden_files_and_caches_below_a_folder_are_passed_over(tmp_path):
    write(tmp_path / "text.txt", "seen")
    write(tmp_path / ".secret", "hidden")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / "__pycache__" / "x.pyc", b"\xff\xfe")
    assert read_texts([tmp_path]) == "seen"


def test_what_is_named_is_read_although_it_is_hidden(tmp_path):
    write(tmp_path / ".hidden" / "text.txt", "inside")
    file = write(tmp_path / ".secret", "secret")
    assert read_texts([tmp_path / ".hidden", file]) == "inside\nsecret"


def test_a_dash_is_standard_input(tmp_path, monkeypatch):
    give_stdin(monkeypatch, "von außen".encode())
    path = write(tmp_path / "a.txt", "file")
    assert read_texts([path, "-"]) == "file\nvon außen"


def test_standard_input_that_is_not_utf8_is_named(monkeypatch):
    give_stdin(monkeypatch, b"ab\xffc")
    with pytest.raises(SurgeryError, match=r"standard input.*0xff.*\b2\b"):
        read_texts(["-"])


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = write(tmp_path / "bom.txt", b"\xef\xbb\xbftext")
    assert read_texts([path]) == "text"


@given(st.text(max_size=20), st.booleans())
def test_the_first_bad_byte_is_given_with_its_position(tmp_path_factory, text, mark):
    good = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    path = write(tmp_path_factory.mktemp("bad") / "bad.txt", good + b"\xfe and \xff")
    with pytest.raises(SurgeryError) as caught:
        read_texts([path])
    assert re.search(rf"{path}.*0xfe.* {len(good)}$", caught.value.what)
    assert "UTF-8" in caught.value.hint


def test_all_problems_are_told_at_once(tmp_path):
    write(tmp_path / "folder" / "one.txt", b"\xff")
    write(tmp_path / "folder" / "two.txt", b"ok\xc3")
    good = write(tmp_path / "good.txt", "good")
    with pytest.raises(SurgeryError) as caught:
        read_texts([tmp_path / "missing", tmp_path / "folder", good])
    message = str(caught.value)
    assert str(tmp_path / "missing") in message
    assert re.search(r"one\.txt.*0xff.*\b0; .*two\.txt.*0xc3.*\b2\b", message)
    assert "good.txt" not in message


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(SurgeryError, match="/proc/self/mem"):
        read_texts(["/proc/self/mem"])


def test_nothing_to_read_is_an_error(tmp_path):
    empty, other = write(tmp_path / "empty.txt", ""), write(tmp_path / "other.txt", "")
    (tmp_path / "folder").mkdir()
    for paths in ([], [empty], [empty, other], [tmp_path / "folder"]):
        with pytest.raises(SurgeryError, match="no text"):
            read_texts(paths)


def test_an_empty_file_adds_nothing(tmp_path):
    empty, full = write(tmp_path / "empty.txt", ""), write(tmp_path / "full.txt", "text")
    assert read_texts([empty, full]) == read_texts([full, empty]) == "text"


def test_the_built_in_reference_is_english_prose():
    text = python_reference()
    assert len(text) > 300_000
    words = text.lower().split()
    assert words.count("the") / len(words) > 0.04  # about 1 word in 20 in English


def test_the_built_in_source_is_python():
    text = python_source()
    assert len(text) > 1_000_000
    definitions = [line for line in text.split("\n") if line.startswith(("def ", "class "))]
    assert len(definitions) > 1000
    assert "\ndef dedent(" in text  # textwrap


@pytest.mark.parametrize("corpus", [python_reference, python_source])
def test_the_built_in_corpora_are_the_same_each_time_and_can_be_encoded(corpus):
    text = corpus()
    assert text == corpus()
    tokenizer = CharacterTokenizer(text)
    assert tokenizer.vocab_size < 1000
    assert len(tokenizer.encode_to_numpy(text)) == len(text)


@given(st.text())
def test_the_split_loses_nothing_and_keeps_the_order(text):
    train, validation = split_by_position(text)
    assert train + validation == text
    assert len(train) == len(text) * 9 // 10


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="../shared/data is not there")
def test_tinyshakespeare_is_split_as_usual():
    train, validation = split_by_position(read_texts([SHAKESPEARE]))
    assert (len(train), len(validation)) == (1_003_854, 111_540)
