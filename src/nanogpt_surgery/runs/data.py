"""The data of a training, by what was named: texts, folders of ids, mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_surgery.data.conversations.record_files import warn_of_records
from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
from nanogpt_surgery.data.text.corpus import check_characters, read_texts, split_by_position
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.data.text.token_files import (
    TOKENIZER,
    TokenFiles,
    is_token_folder,
    open_tokens,
)
from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, encode_text, tokenizer_fingerprint
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer
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
    fingerprints: tuple[str | None, str | None] = None, None
    if isinstance(source, str):
        both = [encode_text(tokenizer, part) for part in split_by_position(source)]
        names = "the text", "the last tenth of the text, which is held out for validation,"
    else:
        both = [source.train, source.validation]
        names = f"{source.folder}, to train on,", f"{source.folder}, held out,"
        known = source.header.fingerprint()
        fingerprints = f"train of {known}", f"validation of {known}"
    for name, ids in zip(names, both, strict=True):
        if len(ids) <= block_size:
            raise SurgeryError(
                f"{name} has {len(ids):,} tokens; a window and its last target need "
                f"{block_size + 1:,}",
                "give more text, or a smaller block_size",
            )
    train, held_out = (
        GPTDataset.from_ids(ids, block_size, fingerprint=fingerprint)
        for ids, fingerprint in zip(both, fingerprints, strict=True)
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
