"""`surgery data prepare`: a corpus of any size as files of ids."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from nanogpt_surgery.cli.framework.console import PLAIN_LINE_EVERY, Json, say, show
from nanogpt_surgery.cli.model_options import CHARACTERS, named_tokenizer
from nanogpt_surgery.cli.training_run import check_no_records
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report


def prepare(
    *text: str,
    out: Path,
    tokenizer: str = CHARACTERS,
    held_out: float | None = None,
    workers: int = 0,
    json: Json = False,
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
    """
    from nanogpt_surgery.data.conversations.record_files import warn_of_records
    from nanogpt_surgery.data.text.corpus import chunks_of
    from nanogpt_surgery.data.text.token_files import is_token_folder
    from nanogpt_surgery.runs.data import prepare_folder

    _check_folder(out, text)
    check_no_records(text)
    warn_of_records(text)
    finished, wanted = is_token_folder(out), named_tokenizer(tokenizer)
    try:
        chunks = chunks_of(text)
        prepare_folder(chunks, out, wanted, held_out, workers, _progress(len(chunks)))
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with {out}")
        sys.exit(130)
    if finished:
        say(f"{out} was finished before: every byte is as it was written")
    show(_report(out), json)
    say(f"surgery train {out} --out … trains on it")


def _check_folder(out: Path, text: Sequence[str]) -> None:
    """Raises if `out` holds anything but a folder of tokens, finished or begun, or nothing.

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


def _progress(chunks: int) -> Callable[[int], None]:
    """A function that says from time to time how many chunks are done."""
    last = monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if monotonic() - last >= PLAIN_LINE_EVERY:
            say(f"{done:,} of {chunks:,} chunks are done")
            last = monotonic()

    return tell


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
