"""A folder of ids made of texts: whole or not there, and gone on with after a stop."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from nanogpt_surgery.data.text.corpus import Chunk
from nanogpt_surgery.data.text.preparation import characters_of, prepare_tokens
from nanogpt_surgery.data.text.token_files import TOKENIZER, is_token_folder, verify_tokens
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, tokenizer_fingerprint
from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
from nanogpt_surgery.files.disk_errors import tried_again, writing
from nanogpt_surgery.files.lock import LOCK, file_lock
from nanogpt_surgery.files.writing import temporary_beside
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer, save_tokenizer


def prepare_folder(
    chunks: Sequence[Chunk],
    out: Path,
    tokenizer: Tokenizer | None = None,
    held_out: float | None = None,
    workers: int = 0,
    on_progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Encodes chunks of text into a folder of ids, which is there whole or not at all.

    Until it is finished it lies beside its place, under a temporary name; the same call goes on
    with what is there, and of a finished folder it verifies every byte. What was begun otherwise,
    and left, is begun anew, with a warning.

    Args:
        chunks: from `chunks_of`.
        out: the folder; empty, or not there, or one that this made.
        tokenizer: None for one of all characters.
        held_out: see `prepare_tokens`, as of `workers`.
        workers: processes (0: one for each core).
        on_progress: called with the number of chunks that are done.

    Raises:
        SurgeryError: as `prepare_tokens` and `verify_tokens`; nothing unfinished is left.
    """
    finished = is_token_folder(out)
    folder = out if finished else _unfinished(out)
    # `save_tokenizer` needs it. A signal during an import ends the process at once, with no time to
    # remove the folder.
    import_module("nanogpt_surgery.formats.comparison")
    with writing(out):
        tried_again(lambda: folder.mkdir(parents=True, exist_ok=True))

    def prepare() -> None:
        _provide_tokenizer(tokenizer, folder / TOKENIZER, chunks, workers)
        opens = partial(open_tokenizer, folder / TOKENIZER)
        for done in prepare_tokens(chunks, folder, opens, held_out, workers):
            on_progress(done)

    with file_lock(folder / LOCK):
        if finished:
            prepare()
            verify_tokens(folder)
            return
        _prepare_or_clear(prepare, folder, out)
    with writing(out):
        tried_again(lambda: folder.rename(out))


def _prepare_or_clear(prepare: Callable[[], None], folder: Path, out: Path) -> None:
    """Prepares, or removes what an error leaves, and what a stop leaves without any finished part.

    What an earlier call left unfinished and this one cannot go on with is begun anew.
    """
    begun = any(folder.glob("parts/*.json"))
    try:
        prepare()
    except SurgeryError as error:
        _clear(folder)
        if not begun or isinstance(error.__cause__, OSError):
            raise
        warnings.warn(
            f"{out} was left unfinished by another command, and is begun anew",
            SurgeryWarning,
            stacklevel=3,
        )
        prepare()
    finally:
        if not is_token_folder(folder) and not any(folder.glob("parts/*.json")):
            shutil.rmtree(folder, ignore_errors=True)


def _unfinished(out: Path) -> Path:
    """Where a preparation lies until it is finished: a temporary name that follows from its own."""
    name = temporary_beside(out).name.rpartition("-")[0]
    folder = out.with_name(f"{name}-{hashlib.sha256(out.name.encode()).hexdigest()[:8]}")
    if out.is_dir() and not folder.exists():  # empty, or begun by an earlier version
        out.rename(folder)
    return folder


def _clear(folder: Path) -> None:
    """Removes what a preparation leaves, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _provide_tokenizer(
    wanted: Tokenizer | None, folder: Path, chunks: Sequence[Chunk], workers: int
) -> None:
    """Makes the tokenizer's folder, or checks the one that is there.

    Raises:
        SurgeryError: another one is there.
    """
    if not folder.exists():
        of_characters = CharacterTokenizer.from_characters
        save_tokenizer(wanted or of_characters(characters_of(chunks, workers)), folder)
        return
    there = open_tokenizer(folder)
    if there is None:
        raise SurgeryError(
            f"{folder} holds no tokenizer.json, by which the ids were made",
            "put it back, or choose a new folder",
        )
    if wanted is None and isinstance(there, CharacterTokenizer):
        return
    if wanted is None or tokenizer_fingerprint(there) != tokenizer_fingerprint(wanted):
        raise SurgeryError(
            f"{folder} holds another tokenizer than the one that was named",
            "give the one it was begun with, or choose a new folder",
        )
