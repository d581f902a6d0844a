"""`surgery data prepare`: a corpus of any size as files of ids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import PLAIN_LINE_EVERY, say, show
from nanogpt_surgery.cli.model_options import CHARACTERS, named_tokenizer
from nanogpt_surgery.cli.training_run import check_no_records
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.text.corpus import Chunk
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.report import Report


def prepare(
    *text: str,
    out: Path,
    tokenizer: str = CHARACTERS,
    held_out: float | None = None,
    workers: int = 0,
    json: bool = False,
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
    held_out
        the share for validation; by default a tenth, but at most 16 MiB of text in all
    workers
        processes (0: one for each core)
    json
        print the result as JSON
    """
    from nanogpt_surgery.data.conversations.record_files import warn_of_records
    from nanogpt_surgery.data.text.corpus import chunks_of
    from nanogpt_surgery.files.disk_errors import make_folder
    from nanogpt_surgery.files.lock import LOCK, file_lock

    _check_folder(out, text)
    check_no_records(text)
    warn_of_records(text)
    chunks = chunks_of(text)
    _bring_back(out)
    begun = out.is_dir() and any(path.name != LOCK for path in out.iterdir())
    make_folder(out)
    try:
        with file_lock(out / LOCK):
            asked = {"held_out": held_out, "workers": workers}
            _prepare_or_leave_nothing(chunks, out, tokenizer, asked, begun)
    except KeyboardInterrupt:
        _put_aside(out)
        say(f"stopped; the same command goes on with {out}")
        sys.exit(130)
    show(_report(out), json)
    say(f"surgery train {out} --out … trains on it")


def _aside(out: Path) -> Path:
    """Where an interrupted preparation waits, under a temporary name that follows from its own."""
    import hashlib

    from nanogpt_surgery.files.temporary import temporary_beside

    name = temporary_beside(out).name.rpartition("-")[0]
    return out.with_name(f"{name}-{hashlib.sha256(out.name.encode()).hexdigest()[:8]}")


def _bring_back(out: Path) -> None:
    """Go on with what an interrupted preparation left."""
    if _aside(out).is_dir() and not out.exists():
        _aside(out).rename(out)


def _put_aside(out: Path) -> None:
    """Leave of an interrupted preparation what the same command goes on with, or nothing."""
    import shutil

    from nanogpt_surgery.data.text.token_files import is_token_folder

    if is_token_folder(out):
        return
    aside = _aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    if any(out.glob("parts/*.json")):
        out.rename(aside)
    else:
        shutil.rmtree(out, ignore_errors=True)


def _prepare_or_leave_nothing(
    chunks: list[Chunk], out: Path, tokenizer: str, values: dict[str, Any], begun: bool
) -> None:
    """Prepare, or remove what an error leaves unfinished.

    What an earlier command left unfinished and this one cannot go on with is begun anew.

    Raises:
        SurgeryError: as `_prepare`.
    """
    from nanogpt_surgery.data.text.token_files import is_token_folder
    from nanogpt_surgery.files.lock import LOCK

    try:
        _prepare(chunks, out, tokenizer, values)
    except SurgeryError as error:
        if is_token_folder(out):
            raise
        _clear(out)
        if not begun or isinstance(error.__cause__, OSError):
            (out / LOCK).unlink(missing_ok=True)
            if not any(out.iterdir()):
                out.rmdir()
            raise
        say(f"note: {out} was left unfinished by another command, and is begun anew")
        _prepare_or_leave_nothing(chunks, out, tokenizer, values, begun=False)


def _clear(folder: Path) -> None:
    """Remove what a preparation puts into a folder, but for the lock."""
    import shutil

    from nanogpt_surgery.data.text.preparation import ASKED, PARTS
    from nanogpt_surgery.data.text.token_files import SPLITS, TOKENIZER
    from nanogpt_surgery.files.temporary import remove_temporaries

    remove_temporaries(folder)
    for name in (TOKENIZER, PARTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (ASKED, *(f"{split}.bin" for split in SPLITS)):
        (folder / name).unlink(missing_ok=True)


def _prepare(chunks: list[Chunk], out: Path, tokenizer: str, values: dict[str, Any]) -> None:
    """Prepares the folder while it is locked."""
    from nanogpt_surgery.data.text.preparation import prepare_tokens
    from nanogpt_surgery.data.text.token_files import TOKENIZER, is_token_folder, verify_tokens
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    finished = is_token_folder(out)
    _provide_tokenizer(tokenizer, out / TOKENIZER, chunks, values["workers"])
    opens = partial(open_tokenizer, out / TOKENIZER)
    _watch(prepare_tokens(chunks, out, opens, **values), len(chunks))
    if finished:
        verify_tokens(out)
        say(f"{out} was finished before: every byte is as it was written")


def _check_folder(out: Path, text: Sequence[str]) -> None:
    """Refuse a folder that holds anything but what a preparation leaves, stopped at any moment.

    Raises:
        SurgeryError: there is no text, or the folder holds something else, or lies in the corpus,
            which it would become part of.
    """
    from nanogpt_surgery.data.text.preparation import ASKED
    from nanogpt_surgery.data.text.token_files import TOKENIZER
    from nanogpt_surgery.files.lock import LOCK
    from nanogpt_surgery.files.temporary import is_temporary

    if not text:
        raise SurgeryError("no text was named", "surgery data prepare TEXT … --out FOLDER")
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


def _provide_tokenizer(named: str, folder: Path, chunks: list[Chunk], workers: int) -> None:
    """Make the tokenizer's folder, or check the one that is there.

    Raises:
        SurgeryError: another one is there.
    """
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer, save_tokenizer

    wanted = named_tokenizer(named)
    if not folder.exists():
        save_tokenizer(wanted or _of_characters(chunks, workers), folder)
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


def _of_characters(chunks: list[Chunk], workers: int) -> Tokenizer:
    from nanogpt_surgery.data.text.preparation import characters_of
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer

    return CharacterTokenizer.from_characters(characters_of(chunks, workers))


def _watch(done: Iterable[int], chunks: int) -> None:
    last = monotonic()
    for number in done:
        if monotonic() - last >= PLAIN_LINE_EVERY:
            say(f"{number:,} of {chunks:,} chunks are done")
            last = monotonic()


def _report(out: Path) -> Report:
    from nanogpt_surgery.data.text.token_files import DTYPES, SPLITS, read_header
    from nanogpt_surgery.report import Report

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
