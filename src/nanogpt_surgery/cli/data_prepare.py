"""`surgery data prepare`: a corpus of any size as files of ids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import PLAIN_LINE_EVERY, say, show
from nanogpt_surgery.cli.options import given, options_of_function
from nanogpt_surgery.cli.train import CHARACTERS
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.pieces import Piece
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.lora.report import Report

PREPARE = "nanogpt_surgery.data.preparation:prepare_tokens"
LEFT_OUT = ("pieces", "folder", "tokenizer_of")
PrepareOptions: Any = options_of_function(PREPARE, "Preparation", leave_out=LEFT_OUT)


def prepare(
    *text: str,
    out: Path,
    tokenizer: str = CHARACTERS,
    options: PrepareOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Encode text into a folder of ids that training maps instead of loading.

    The same command goes on where it was stopped; on a finished folder it checks every byte.

    Parameters
    ----------
    text
        files, or folders of them
    out
        the folder to make: tokens.json, train.bin, validation.bin and the tokenizer
    tokenizer
        a folder with a tokenizer.json, as surgery tokenizer train makes it; or characters
    json
        print the result as JSON
    """
    from nanogpt_surgery.data.pieces import pieces_of
    from nanogpt_surgery.files import make_folder
    from nanogpt_surgery.formats.run_folder import LOCK, held

    if not text:
        raise SurgeryError("no text was named", "surgery data prepare TEXT … --out FOLDER")
    _check_folder(out, text)
    pieces = pieces_of(text)
    make_folder(out)
    try:
        with held(out / LOCK):
            _prepare(pieces, out, tokenizer, given(options))
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with {out}")
        sys.exit(130)
    show(_report(out), json)
    say(f"surgery train {out} --out … trains on it")


def _prepare(pieces: list[Piece], out: Path, tokenizer: str, values: dict[str, Any]) -> None:
    """Everything that is done while the folder is held."""
    from nanogpt_surgery.data.preparation import prepare_tokens
    from nanogpt_surgery.data.token_files import TOKENIZER, is_token_folder, verify_tokens
    from nanogpt_surgery.formats.tokenizer_files import open_tokenizer

    finished = is_token_folder(out)
    _provide_tokenizer(tokenizer, out / TOKENIZER, pieces, values.get("workers", 0))
    opens = partial(open_tokenizer, out / TOKENIZER)
    _watch(prepare_tokens(pieces, out, opens, **values), len(pieces))
    if finished:
        verify_tokens(out)
        say(f"{out} was finished before: every byte is as it was written")


def _check_folder(out: Path, text: Sequence[str]) -> None:
    """Refuse a folder that holds anything but what a preparation leaves, stopped at any moment.

    Raises:
        SurgeryError: it holds something else, or lies in the corpus, which it would become part of.
    """
    from nanogpt_surgery.data.preparation import ASKED
    from nanogpt_surgery.data.token_files import TOKENIZER
    from nanogpt_surgery.files import is_temporary
    from nanogpt_surgery.formats.run_folder import LOCK

    inside = [
        p for p in text if Path(p).is_dir() and out.resolve().is_relative_to(Path(p).resolve())
    ]
    if inside:
        raise SurgeryError(
            f"{out} lies in {inside[0]}, all of which is to be encoded", "choose an --out outside"
        )
    if not out.exists() or (out / ASKED).is_file():
        return
    ours = (LOCK, TOKENIZER)
    if not out.is_dir() or any(p.name not in ours and not is_temporary(p) for p in out.iterdir()):
        raise SurgeryError(f"{out} exists and is no folder of tokens", "choose a new --out")


def _provide_tokenizer(named: str, folder: Path, pieces: list[Piece], workers: int) -> None:
    """Make the tokenizer's folder, or check the one that is there.

    Raises:
        SurgeryError: another one is there.
    """
    from nanogpt_surgery.cli.train import opened_tokenizer
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.tokenizer import tokenizer_fingerprint
    from nanogpt_surgery.formats.tokenizer_files import open_tokenizer, save_tokenizer

    wanted = None if named == CHARACTERS else opened_tokenizer(named)
    if not folder.exists():
        save_tokenizer(wanted or _of_characters(pieces, workers), folder)
        return
    there = open_tokenizer(folder)
    if there is None:
        raise SurgeryError(
            f"{folder} holds no tokenizer.json, by which the ids were made",
            "put it back, or choose a new --out",
        )
    if wanted is None and isinstance(there, CharacterTokenizer):
        return
    if wanted is None or tokenizer_fingerprint(there) != tokenizer_fingerprint(wanted):
        raise SurgeryError(
            f"{folder} holds another tokenizer than {named}",
            "give the one it was begun with, or choose a new --out",
        )


def _of_characters(pieces: list[Piece], workers: int) -> Tokenizer:
    from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.preparation import characters_of

    return CharacterTokenizer.from_characters(characters_of(pieces, workers))


def _watch(done: Iterable[int], pieces: int) -> None:
    last = monotonic()
    for number in done:
        if monotonic() - last >= PLAIN_LINE_EVERY:
            say(f"{number:,} of {pieces:,} pieces are done")
            last = monotonic()


def _report(out: Path) -> Report:
    from nanogpt_surgery.data.token_files import DTYPES, SPLITS, read_header
    from nanogpt_surgery.lora.report import Report

    header = read_header(out)
    tokens = {f"{split}_tokens": header.tokens(split) for split in SPLITS}
    summary = {
        "folder": str(out),
        "dtype": header.dtype,
        "vocabulary": header.vocab_size,
        **tokens,
        "bytes": sum(tokens.values()) * DTYPES[header.dtype],
        "fingerprint": header.fingerprint(),
    }
    return Report("prepared", [], summary)
