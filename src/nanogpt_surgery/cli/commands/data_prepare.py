"""`surgery data prepare`: a corpus of any size as files of ids."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from nanogpt_surgery.cli.framework.console import PLAIN_LINE_EVERY, say, show
from nanogpt_surgery.cli.model_options import CHARACTERS, named_tokenizer
from nanogpt_surgery.cli.training_run import check_no_records
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.text.corpus import Chunk
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

    _check_folder(out, text)
    check_no_records(text)
    warn_of_records(text)
    try:
        _prepare_whole(chunks_of(text), out, tokenizer, held_out, workers)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with {out}")
        sys.exit(130)
    show(_report(out), json)
    say(f"surgery train {out} --out … trains on it")


def _check_folder(out: Path, text: Sequence[str]) -> None:
    """Refuses a folder that holds anything but what a preparation leaves, stopped at any moment.

    Raises:
        SurgeryError: it holds something else, or lies in the corpus, which it would become part of.
    """
    from nanogpt_surgery.data.text.preparation import ASKED
    from nanogpt_surgery.data.text.token_files import TOKENIZER
    from nanogpt_surgery.files.lock import LOCK
    from nanogpt_surgery.files.writing import is_temporary

    if not text:
        raise SurgeryError("no text was named", "surgery data prepare TEXT … --out FOLDER")
    for path in map(Path, text):
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise SurgeryError(
                f"{out} lies in {path}, all of which is to be encoded", "choose an --out outside"
            )
    if not out.exists() or (out / ASKED).is_file():
        return
    ours = (LOCK, TOKENIZER)
    if not out.is_dir() or any(p.name not in ours and not is_temporary(p) for p in out.iterdir()):
        raise SurgeryError(f"{out} exists and is no folder of tokens", "choose a new --out")


def _prepare_whole(
    chunks: list[Chunk], out: Path, tokenizer: str, held_out: float | None, workers: int
) -> None:
    """Prepares a folder under a temporary name, which it changes for its own when it is finished.

    A finished one is verified instead. What was left unfinished, and cannot be gone on with, is
    begun anew.

    Raises:
        SurgeryError: as `_prepare`; nothing of this preparation is left then.
    """
    from nanogpt_surgery.data.text.token_files import is_token_folder
    from nanogpt_surgery.files.disk_errors import writing
    from nanogpt_surgery.files.lock import LOCK, file_lock

    finished = is_token_folder(out)
    folder = out if finished else _unfinished(out)
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / LOCK):
        begun = any(folder.glob("parts/*.json"))
        try:
            _prepare(chunks, folder, tokenizer, held_out, workers)
        except SurgeryError as error:
            if finished:
                raise
            _clear(folder)
            if not begun or isinstance(error.__cause__, OSError):
                raise
            say(f"note: {out} was left unfinished by another command, and is begun anew")
            _prepare(chunks, folder, tokenizer, held_out, workers)
        finally:
            if (
                not finished
                and not is_token_folder(folder)
                and not any(folder.glob("parts/*.json"))
            ):
                shutil.rmtree(folder, ignore_errors=True)
    if finished:
        say(f"{out} was finished before: every byte is as it was written")
    else:
        with writing(out):
            folder.rename(out)


def _clear(folder: Path) -> None:
    """Removes what a preparation leaves, but for its lock."""
    from nanogpt_surgery.files.lock import LOCK

    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _unfinished(out: Path) -> Path:
    """Where a preparation lies until it is finished: a temporary name that follows from its own."""
    import hashlib

    from nanogpt_surgery.files.writing import temporary_beside

    name = temporary_beside(out).name.rpartition("-")[0]
    folder = out.with_name(f"{name}-{hashlib.sha256(out.name.encode()).hexdigest()[:8]}")
    if out.is_dir() and not folder.exists():  # empty, or begun by an earlier version
        out.rename(folder)
    return folder


def _prepare(
    chunks: list[Chunk], folder: Path, tokenizer: str, held_out: float | None, workers: int
) -> None:
    """Prepares a folder, or verifies one that is finished."""
    from nanogpt_surgery.data.text.preparation import prepare_tokens
    from nanogpt_surgery.data.text.token_files import TOKENIZER, is_token_folder, verify_tokens
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    finished, last = is_token_folder(folder), monotonic()
    _provide_tokenizer(tokenizer, folder / TOKENIZER, chunks, workers)
    opens = partial(open_tokenizer, folder / TOKENIZER)
    for done in prepare_tokens(chunks, folder, opens, held_out, workers):
        if monotonic() - last >= PLAIN_LINE_EVERY:
            say(f"{done:,} of {len(chunks):,} chunks are done")
            last = monotonic()
    if finished:
        verify_tokens(folder)


def _provide_tokenizer(named: str, folder: Path, chunks: list[Chunk], workers: int) -> None:
    """Make the tokenizer's folder, or check the one that is there.

    Raises:
        SurgeryError: another one is there.
    """
    from nanogpt_surgery.data.text.preparation import characters_of
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer, save_tokenizer

    wanted = named_tokenizer(named)
    if not folder.exists():
        if wanted is None:
            wanted = CharacterTokenizer.from_characters(characters_of(chunks, workers))
        save_tokenizer(wanted, folder)
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
