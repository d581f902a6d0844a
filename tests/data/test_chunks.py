"""Chunks are the text, cut where a line begins."""

from pathlib import Path

import pytest
from helpers.corpora import TEXT, corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.data.text.corpus import chunks_of, read_span, split_at_line


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aé€😀 \n\t", max_size=200), st.sampled_from([4, 7, 16, 64]))
def test_pieces_are_the_text_and_no_longer_than_twice_the_size(tmp_path_factory, text, size):
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(text.encode())
    if not text:
        with pytest.raises(SurgeryError, match="no text"):
            chunks_of([file], size)
        return
    chunks = chunks_of([file], size)
    assert "".join(read_span(span) for chunk in chunks for span in chunk) == text
    assert all(span.end - span.start <= 2 * size for chunk in chunks for span in chunk)


def test_a_piece_begins_with_a_readable_line_where_there_is_one(tmp_path):
    corpus(tmp_path)
    chunks = chunks_of([tmp_path / "long.txt"], 700)
    assert len(chunks) > 5
    data = (tmp_path / "long.txt").read_bytes()
    for (span,) in chunks[1:]:
        around = data[span.start - 2 : span.start + 1]
        assert around[1:2] == b"\n"
        assert not around[:1].isspace()
        assert not around[2:].isspace()


def test_short_files_share_a_piece(tmp_path):
    chunks = chunks_of(corpus(tmp_path)[1:], 300)
    names = [[Path(span.file).name for span in chunk] for chunk in chunks]
    assert names == [["1.txt", "2.txt"], ["3.txt"], ["4.txt"]]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_text_is_split_without_loss(share):
    for text in (TEXT, "no line at all", "x", "\n\n \n"):
        first, second = split_at_line(text, share)
        assert first + second == text
        assert share or not second


def test_paths_that_cannot_be_cut_are_refused_all_at_once(tmp_path):
    with pytest.raises(SurgeryError, match=r"standard input.*nowhere"):
        chunks_of(["-", tmp_path / "nowhere"])
