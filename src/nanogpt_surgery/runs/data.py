"""The data of a training, by what was named: texts, folders of ids, mixtures.

`prepare_folder` makes such a folder of ids: whole or not there, and gone on with after a stop.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from torch import Tensor

from nanogpt_surgery.data.conversations.record_files import warn_of_records
from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
from nanogpt_surgery.data.text.corpus import Chunk, check_characters, read_texts, split_by_position
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.data.text.preparation import ASKED, characters_of, prepare_tokens
from nanogpt_surgery.data.text.token_files import (
    DTYPES,
    SPLITS,
    TOKENIZER,
    TokenFiles,
    is_token_folder,
    open_tokens,
    read_header,
    verify_tokens,
)
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, encode_text, tokenizer_fingerprint
from nanogpt_surgery.errors import SurgeryError, warn
from nanogpt_surgery.files.disk_errors import tried_again, writing
from nanogpt_surgery.files.lock import LOCK, file_lock
from nanogpt_surgery.files.writing import is_temporary, temporary_beside
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer, save_tokenizer
from nanogpt_surgery.report import Report
from nanogpt_surgery.training.distributed import world

LONGEST_WINDOW = 256  # tokens, where none is asked for


def window_length(asked: int | None, context: int | None) -> int:
    """Tokens in a window: what is asked for, else the model's context, at most 256.

    Raises:
        SurgeryError: less than one is asked for, or more than the context.
    """
    if asked is None:
        return min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    if asked < 1:
        raise SurgeryError(f"block_size is {asked}; it must be at least 1")
    if context is not None and asked > context:
        raise SurgeryError(
            f"a block_size of {asked} tokens exceeds the model's of {context}",
            f"block_size={context}, or less",
        )
    return asked


@dataclass(frozen=True)
class Sources:
    """Texts and open folders of ids, the tokenizer they share, and their weights in a mixture."""

    opened: Sequence[str | TokenFiles]
    tokenizer: Tokenizer
    weights: list[float] | None = None

    def datasets(self, block_size: int) -> tuple[Batches, Batches]:
        """Windows to train on, and those held out: of a text the last tenth.

        Raises:
            SurgeryError: a source is shorter than a window.
        """
        pairs = [_windows(source, self.tokenizer, block_size) for source in self.opened]
        if self.weights is None:
            return pairs[0]
        train, held_out = zip(*pairs, strict=True)
        return Mixture(train, self.weights), Mixture(held_out, self.weights)


def _windows(
    source: str | TokenFiles, tokenizer: Tokenizer, block_size: int
) -> tuple[GPTDataset, GPTDataset]:
    parts: list[tuple[Tensor, str | None]]  # ids, and their hash where it is known
    if isinstance(source, str):
        parts = [(encode_text(tokenizer, part), None) for part in split_by_position(source)]
        names = "the text", "the last tenth of the text, which is held out for validation,"
    else:
        known = source.header.fingerprint()
        parts = [(source.train, f"train of {known}"), (source.validation, f"validation of {known}")]
        names = f"{source.folder}, to train on,", f"{source.folder}, held out,"
    for name, (ids, _) in zip(names, parts, strict=True):
        if len(ids) <= block_size:
            raise SurgeryError(
                f"{name} has {len(ids):,} tokens; a window and its last target need "
                f"{block_size + 1:,}",
                "give more text, or a smaller block_size",
            )
    train, held_out = (
        GPTDataset.from_ids(ids, block_size, fingerprint=digest) for ids, digest in parts
    )
    return train, held_out


def open_sources(
    paths: Sequence[str], mix: str | None = None, tokenizer: Tokenizer | None = None
) -> Sources:
    """Reads the texts and maps the ids that were named.

    Args:
        paths: texts, which are joined without a mix; or folders of ids.
        mix: the proportions of a mixture, one number for each path, as in 3:1.
        tokenizer: for the texts; None takes that of the ids, or one of all characters.

    Raises:
        SurgeryError: a path cannot be read, a folder's ids are another tokenizer's, several paths
            need a mix, its numbers are not as many as the paths, or several processes would read
            standard input.
    """
    if "-" in paths and world().size > 1:
        raise SurgeryError(
            "standard input cannot be read by several processes: each would get a part of it",
            "name a file",
        )
    weights = None if mix is None else _weights(mix, paths)
    folders = [path for path in paths if is_token_folder(path)]
    warn_of_records([path for path in paths if path not in folders])
    if folders and weights is None and len(paths) > 1:
        raise SurgeryError(
            f"{folders[0]} holds ids, which are not joined with another source",
            "mix='3:1' draws from several in proportion",
        )
    groups = [paths] if weights is None else [[path] for path in paths]
    opened = [
        open_tokens(group[0]) if group[0] in folders else read_texts(group) for group in groups
    ]
    found = tokenizer or _tokenizer_of(opened)
    for group, source in zip(groups, opened, strict=True):
        if isinstance(source, str):
            check_characters(found, group, source)
        else:
            _check_ids(source, found)
    return Sources(opened, found, weights)


def _weights(mix: str, paths: Sequence[str]) -> list[float]:
    try:
        weights = [float(word) for word in mix.split(":")]
    except ValueError:
        raise SurgeryError(f"{mix!r} are no weights", "give numbers, as in 3:1") from None
    if len(weights) != len(paths):
        raise SurgeryError(
            f"there are {len(weights)} weights for {len(paths)} sources",
            "give one weight for each, in their order: mix='3:1'",
        )
    return weights


def _tokenizer_of(opened: Sequence[str | TokenFiles]) -> Tokenizer:
    """The tokenizer of the first ids, or one of all the texts' characters."""
    for source in opened:
        if not isinstance(source, str):
            found = open_tokenizer(source.folder / TOKENIZER)
            if found is None:
                raise SurgeryError(f"{source.folder} has lost its tokenizer", "prepare it anew")
            return found
    return CharacterTokenizer("".join(text for text in opened if isinstance(text, str)))


def _check_ids(source: TokenFiles, tokenizer: Tokenizer) -> None:
    wanted = tokenizer_fingerprint(tokenizer)
    if source.header.tokenizer != wanted:
        raise SurgeryError(
            f"the ids in {source.folder} were made by another tokenizer: "
            f"{source.header.tokenizer[:40]}…, not {wanted[:40]}…",
            "prepare them anew, with the tokenizer that is needed",
        )


def check_token_folder(out: Path, text: Sequence[str]) -> None:
    """Raises if a folder of ids cannot be made, or gone on with, at a place.

    Raises:
        SurgeryError: `out` holds something else, or lies in the corpus, which it would become part
            of.
    """
    for path in map(Path, text):
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise SurgeryError(
                f"{out} lies in {path}, all of which is to be encoded", "choose an out outside"
            )
    if not out.exists() or (out / ASKED).is_file():
        return
    ours = (LOCK, TOKENIZER)
    if not out.is_dir() or any(p.name not in ours and not is_temporary(p) for p in out.iterdir()):
        raise SurgeryError(f"{out} exists and is no folder of tokens", "choose a new out")


def prepare_folder(
    chunks: Sequence[Chunk],
    out: Path,
    tokenizer: Tokenizer | None = None,
    held_out: float | None = None,
    workers: int = 0,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Encodes chunks of text into a folder of ids, which is there whole or not at all.

    Until it is finished it lies beside its place, under a temporary name; the same call goes on
    with what is there, and of a finished folder it verifies every byte. What was begun otherwise,
    and left, is begun anew, with a warning. Returns the numbers of tokens, and their fingerprint.

    The folder `out` is empty, or not there, or one that this made; without a tokenizer it gets one
    of all characters; `on_progress` is called with the number of chunks that are done. Else the
    arguments are those of `prepare_tokens`.

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
        else:
            _prepare_or_clear(prepare, folder, out)
    if not finished:
        with writing(out):
            tried_again(lambda: folder.rename(out))
    return _token_report(out)


def _token_report(folder: Path) -> Report:
    header = read_header(folder)
    tokens = {f"{split}_tokens": header.tokens(split) for split in SPLITS}
    summary = {
        "folder": str(folder),
        "dtype": header.dtype,
        "vocabulary": header.vocab_size,
        **tokens,
        "bytes": sum(tokens.values()) * DTYPES[header.dtype],
        "fingerprint": header.fingerprint(),
    }
    return Report("prepared", [], summary)


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
        warn(f"{out} was left unfinished by another command, and is begun anew")
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
