"""Chunks and parts: the same ids whoever made them, in however many attempts."""

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.corpora import TEXT, corpus

from nanogpt_surgery import BPETokenizer, CharacterTokenizer, SurgeryError, read_texts
from nanogpt_surgery.data.text.corpus import chunks_of
from nanogpt_surgery.data.text.preparation import characters_of, prepare_tokens
from nanogpt_surgery.data.text.token_files import open_tokens


def prepared(place: Path, chunks, tokenizer, **options) -> dict[str, bytes]:
    place.mkdir()
    list(prepare_tokens(chunks, place, tokenizer, **({"workers": 1} | options)))
    return contents(place)


def contents(place: Path) -> dict[str, bytes]:
    names = ("tokens.json", "train.bin", "validation.bin")
    assert {path.name for path in place.iterdir()} == {*names, "asked.json"}
    return {name: (place / name).read_bytes() for name in names}


def test_cuts_change_no_token(tmp_path):
    """Byte-pair encodings join nothing across the start of a line, however small the chunks."""
    corpus(tmp_path)
    tokenizer = BPETokenizer.train(TEXT, 400)
    chunks = chunks_of([tmp_path / "long.txt"], 300)
    assert len(chunks) > 20
    prepared(tmp_path / "out", chunks, lambda: tokenizer, held_out=0)
    assert open_tokens(tmp_path / "out").train.tolist() == tokenizer.encode(TEXT)


def test_documents_are_parted_by_the_end_of_text_or_a_newline(tmp_path):
    paths = corpus(tmp_path)
    chunks, whole = chunks_of(paths, 700), read_texts(paths)
    characters = CharacterTokenizer.from_characters(characters_of(chunks, workers=1))
    prepared(tmp_path / "characters", chunks, lambda: characters, held_out=0)
    assert characters.decode(open_tokens(tmp_path / "characters").train.tolist()) == whole
    bpe = BPETokenizer.train(TEXT, 300)
    prepared(tmp_path / "bpe", chunks, lambda: bpe, held_out=0)
    ids = open_tokens(tmp_path / "bpe").train.tolist()
    assert ids.count(bpe.eos_id) == 4  # five documents that are not empty
    parted = bpe.decode(ids).split("<|endoftext|>")
    assert parted == [TEXT, *(f"short text {i} " * (5 * i) for i in range(1, 5))]


def test_each_piece_holds_out_its_end(tmp_path):
    paths = corpus(tmp_path)
    chunks = chunks_of(paths[:1], 2000)
    tokenizer = CharacterTokenizer(TEXT)
    prepared(tmp_path / "out", chunks, lambda: tokenizer, held_out=0.25)
    tokens = open_tokens(tmp_path / "out")
    train, held_out = (tokenizer.decode(t.tolist()) for t in (tokens.train, tokens.validation))
    assert len(tokens.header.train) == len(tokens.header.validation) == len(chunks)
    assert 0.2 < len(held_out) / len(TEXT) < 0.3
    start = end = 0
    joined = []
    for a, b in zip(tokens.header.train, tokens.header.validation, strict=True):
        joined += [train[start : start + a.tokens], held_out[end : end + b.tokens]]
        start, end = start + a.tokens, end + b.tokens
    assert len(joined) > 4
    assert all(stretch[0] == "\n" for stretch in joined[2:]), "what does not follow is parted"
    stretches = [*joined[:2], *(stretch[1:] for stretch in joined[2:])]
    assert not any(stretch[0].isspace() for stretch in stretches)
    assert "".join(stretches) == TEXT


def test_no_separator_stands_where_nothing_follows_it(tmp_path):
    """One document fills the share to train on, and the next is held out from its start."""
    (tmp_path / "a.txt").write_text("x" * 90, "utf-8")
    (tmp_path / "b.txt").write_text("y" * 90, "utf-8")
    chunks = chunks_of([tmp_path / "a.txt", tmp_path / "b.txt"], 300)
    tokenizer = BPETokenizer.train("x y\n" * 50, 260)
    prepared(tmp_path / "out", chunks, lambda: tokenizer, held_out=0.5)
    tokens = open_tokens(tmp_path / "out")
    for split in (tokens.train, tokens.validation):
        text = tokenizer.decode(split.tolist())
        assert not text.startswith("<|endoftext|>")
        assert not text.endswith("<|endoftext|>")


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    paths = corpus(tmp_path)
    chunks = chunks_of(paths, 700)
    opens = partial(CharacterTokenizer.from_characters, characters_of(chunks, workers=1))
    alone = prepared(tmp_path / "alone", chunks, opens, workers=1)
    assert prepared(tmp_path / "two", chunks, opens, workers=2) == alone


KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from nanogpt_surgery import CharacterTokenizer
from nanogpt_surgery.data.text.corpus import chunks_of
from nanogpt_surgery.data.text.preparation import prepare_tokens

text, place = Path(sys.argv[1]), Path(sys.argv[2])
chunks, tokenizer = chunks_of([text], 3000), CharacterTokenizer(text.read_text("utf-8"))
calls = {"left": 0}

def fatal(function):
    def call(*arguments, **options):
        calls["left"] -= 1
        if calls["left"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

os.fsync, Path.replace, Path.unlink = map(fatal, (os.fsync, Path.replace, Path.unlink))

def attempt(folder, kill_at):
    child = os.fork()
    if child == 0:
        calls["left"] = kill_at
        list(prepare_tokens(chunks, folder, lambda: tokenizer, workers=1))
        os._exit(0)
    return os.waitpid(child, 0)[1]

for kill_at in range(1, 1000, 5):
    folder = place / f"at-{kill_at}"
    folder.mkdir()
    if attempt(folder, kill_at) == 0:
        print(kill_at)
        break
    assert not (folder / "tokens.json").exists() or (folder / "parts").exists()
    attempt(folder, 9)  # and once more, soon after
    assert attempt(folder, 0) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_kill_at_any_moment_is_made_good(tmp_path):
    """SIGKILL before a flush, rename or deletion; then the same bytes as without it."""
    (tmp_path / "long.txt").write_text(TEXT, "utf-8")
    command = [sys.executable, "-c", KILLED_EVERYWHERE, tmp_path / "long.txt", tmp_path]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=quiet
    )
    assert done.returncode == 0, done.stderr
    unkilled = int(done.stdout)
    assert unkilled > 30
    wanted = contents(tmp_path / f"at-{unkilled}")
    for kill in range(1, unkilled, 5):
        assert contents(tmp_path / f"at-{kill}") == wanted, f"killed at call {kill}"


def test_finished_parts_are_kept_and_others_made_anew(tmp_path):
    paths = corpus(tmp_path)
    chunks, tokenizer = chunks_of(paths[:1], 1500), CharacterTokenizer(TEXT)
    whole = prepared(tmp_path / "whole", chunks, lambda: tokenizer)
    place = tmp_path / "cut"
    place.mkdir()
    for done in prepare_tokens(chunks, place, lambda: tokenizer, workers=1):
        if done == 4:
            break
    part = place / "parts" / "00002.train.bin"
    part.write_bytes(part.read_bytes()[:-2])
    first = (place / "parts" / "00000.train.bin").stat().st_mtime_ns
    steps = prepare_tokens(chunks, place, lambda: tokenizer, workers=1)
    assert next(steps) == 3, "three of four parts are whole"
    assert (place / "parts" / "00000.train.bin").stat().st_mtime_ns == first
    list(steps)
    assert contents(place) == whole


def test_another_corpus_or_tokenizer_is_refused_with_the_difference(tmp_path):
    paths = corpus(tmp_path)
    chunks, tokenizer = chunks_of(paths, 1500), CharacterTokenizer(TEXT + "short text")
    prepared(tmp_path / "out", chunks, lambda: tokenizer)

    def again(chunks=chunks, tokenizer=tokenizer, **options):
        list(prepare_tokens(chunks, tmp_path / "out", lambda: tokenizer, workers=1, **options))

    again()
    with pytest.raises(SurgeryError, match=r"out.*: tokenizer differs\n"):
        again(tokenizer=CharacterTokenizer(TEXT + "Ω"))
    with pytest.raises(SurgeryError, match=r"out.*: held_out differs\n"):
        again(held_out=0.3)
    with pytest.raises(SurgeryError, match=r"out.*1\.txt is gone"):
        again(chunks=chunks_of([paths[0]], 1500))
    (tmp_path / "long.txt").write_text(TEXT.upper(), "utf-8")
    with pytest.raises(SurgeryError, match=r"out.*long\.txt has changed"):
        again(chunks=chunks_of(paths, 1500))


def test_bytes_that_are_not_utf8_are_refused_with_their_position(tmp_path):
    data = bytearray(TEXT.encode())
    data[5000] = 0xFF
    (tmp_path / "bad.txt").write_bytes(data)
    (tmp_path / "out").mkdir()
    chunks = chunks_of([tmp_path / "bad.txt"], 1000)
    with pytest.raises(SurgeryError, match=r"bad\.txt.*0xff.*\b5000\b"):
        list(prepare_tokens(chunks, tmp_path / "out", lambda: CharacterTokenizer(TEXT), workers=1))
    assert not (tmp_path / "out" / "tokens.json").exists()


def test_a_share_beyond_all_is_refused(tmp_path):
    corpus(tmp_path)
    with pytest.raises(SurgeryError, match=r"held_out.*1\.0"):
        prepared(tmp_path / "out", chunks_of([tmp_path / "short"]), Path, held_out=1.0)


def test_a_disk_that_is_full_while_parts_are_joined_is_said_and_can_be_gone_on_from(tmp_path):
    """Each part has room, all together do not; a limit for files stands for the disk."""
    paths, letters = corpus(tmp_path), CharacterTokenizer(TEXT + "short text 01234")
    chunks = chunks_of(paths, 700)
    whole = prepared(tmp_path / "whole", chunks, lambda: letters)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["train.bin"]) // 2, before[1]))
    try:
        with pytest.raises(SurgeryError, match=r"train\.bin.*File too large"):
            prepared(tmp_path / "full", chunks, lambda: letters)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "full" / "parts").exists()
    list(prepare_tokens(chunks, tmp_path / "full", lambda: letters, workers=1))
    assert contents(tmp_path / "full") == whole
