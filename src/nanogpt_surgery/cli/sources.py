"""The named sources as datasets: texts, folders of ids, or a mixture of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.processes import is_distributed
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
    from nanogpt_surgery.data.text.token_files import TokenFiles
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sources:
    """Texts and open folders of ids, the tokenizer they share, and their weights in a mixture."""

    opened: list[str | TokenFiles]
    tokenizer: Tokenizer
    weights: list[float] | None

    def datasets(self, block_size: int) -> tuple[Batches, Batches]:
        """Windows to train on, and those held out.

        Raises:
            SurgeryError: a source is shorter than a window.
        """
        from nanogpt_surgery.data.text.mixture import Mixture

        pairs = [_pair(source, self.tokenizer, block_size) for source in self.opened]
        if self.weights is None:
            return pairs[0]
        train, held_out = ([pair[i] for pair in pairs] for i in (0, 1))
        return Mixture(train, self.weights), Mixture(held_out, self.weights)


def named_sources(
    paths: tuple[str, ...], weights: str | None, tokenizer: Tokenizer | None
) -> Sources:
    """Returns the sources of `train`: those named, else Python's language reference."""
    from nanogpt_surgery.data.text.corpus import python_reference, python_source
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer

    if paths or weights is not None:
        check_no_records(paths)
        return open_sources(paths, weights, tokenizer)
    say("no text was named: training on Python's language reference")
    text = python_reference()
    # With the characters of the other built-in corpus, so that `finetune` can read it.
    return Sources([text], tokenizer or CharacterTokenizer(text + python_source()), None)


def check_no_records(paths: tuple[str, ...], command: str = "surgery finetune MODEL") -> None:
    """Raise `SurgeryError` if a file that is to be learned as text holds records.

    As text their braces, quotes and names of fields would be learned.

    Args:
        paths: what was named.
        command: what trains on answers.
    """
    from nanogpt_surgery.data.conversations.instructions import check_first_record
    from nanogpt_surgery.data.conversations.record_files import holds_records

    for path in paths:
        if path != "-" and holds_records(path):
            check_first_record(path)
            raise SurgeryError(
                f"{path} holds questions with answers, not text",
                f"{command} {path} --out ADAPTER trains on the answers",
            )


def say_data(paths: tuple[str, ...]) -> None:
    """Say of what is learned as text that it looks like data, by its name or its beginning."""
    from nanogpt_surgery.data.conversations.record_files import begins_like_data, holds_records
    from nanogpt_surgery.data.text.corpus import files_of

    for path in paths:
        if path == "-" or not Path(path).exists():
            continue
        if Path(path).is_dir():
            named = [file for file in files_of([path]) if holds_records(file)]
            if named:
                say(
                    f"note: {path} holds {len(named):,} files of data ({named[0].name}), which are "
                    "learned as text, their marks and names of fields too"
                )
        elif kind := begins_like_data(path):
            say(
                f"note: {path} looks like {kind}; it is learned as text, its marks too (questions "
                "with answers belong in a .csv, .json or .jsonl file)"
            )


def open_sources(
    paths: tuple[str, ...], weights: str | None, tokenizer: Tokenizer | None = None
) -> Sources:
    """Read the texts and map the ids that were named.

    Args:
        paths: texts, which are joined without weights; or folders of ids.
        weights: the proportions of a mixture, one number for each path, as in 3:1.
        tokenizer: for the texts; None takes that of the ids, or one of all characters.

    Raises:
        SurgeryError: a path cannot be read, a folder's ids are another tokenizer's, several paths
            need weights, the weights are not as many numbers as there are paths, or several
            processes would read standard input.
    """
    from nanogpt_surgery.data.text.corpus import check_characters, read_texts
    from nanogpt_surgery.data.text.token_files import is_token_folder, open_tokens

    if "-" in paths and is_distributed():
        raise SurgeryError(
            "standard input cannot be read by several processes: each would get a part of it",
            "name a file",
        )
    ratios = _ratios(weights, paths)
    say_data(tuple(path for path in paths if not is_token_folder(path)))
    folders = [path for path in paths if is_token_folder(path)]
    if folders and ratios is None and len(paths) > 1:
        raise SurgeryError(
            f"{folders[0]} holds ids, which are not joined with another source",
            "add --mix, as in --mix 3:1, to draw from several in proportion",
        )
    groups = [paths] if ratios is None else [(path,) for path in paths]
    opened = [
        open_tokens(group[0]) if is_token_folder(group[0]) else read_texts(group)
        for group in groups
    ]
    found = tokenizer or _tokenizer_of(opened)
    _check_tokenizer(found, opened)
    for group, source in zip(groups, opened, strict=True):
        if isinstance(source, str):
            check_characters(found, group, source)
    return Sources(opened, found, ratios)


def _ratios(weights: str | None, paths: tuple[str, ...]) -> list[float] | None:
    if weights is None:
        return None
    try:
        ratios = [float(word) for word in weights.split(":")]
    except ValueError:
        raise SurgeryError(f"{weights!r} are no weights", "give numbers, as in 3:1") from None
    if len(ratios) != len(paths):
        raise SurgeryError(
            f"there are {len(ratios)} weights for {len(paths)} sources",
            "give one weight for each, in their order, as in --mix 3:1",
        )
    return ratios


def _tokenizer_of(opened: list[str | TokenFiles]) -> Tokenizer:
    """The tokenizer of the first ids, or one of all the texts' characters."""
    from nanogpt_surgery.data.text.token_files import TOKENIZER
    from nanogpt_surgery.data.tokenizers.character_tokenizer import CharacterTokenizer
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    for source in opened:
        if not isinstance(source, str):
            found = open_tokenizer(source.folder / TOKENIZER)
            if found is None:
                raise SurgeryError(f"{source.folder} has lost its tokenizer", "prepare it anew")
            return found
    return CharacterTokenizer("".join(text for text in opened if isinstance(text, str)))


def _check_tokenizer(tokenizer: Tokenizer, opened: list[str | TokenFiles]) -> None:
    from nanogpt_surgery.data.tokenizers.tokenizer import tokenizer_fingerprint

    for source in opened:
        if not isinstance(source, str) and source.header.tokenizer != tokenizer_fingerprint(
            tokenizer
        ):
            raise SurgeryError(
                f"the ids in {source.folder} were made by another tokenizer: "
                f"{source.header.tokenizer[:40]}…, not {tokenizer_fingerprint(tokenizer)[:40]}…",
                "surgery data prepare … --tokenizer FOLDER makes ids of the one that is needed",
            )


def _pair(
    source: str | TokenFiles, tokenizer: Tokenizer, block_size: int
) -> tuple[GPTDataset, GPTDataset]:
    from nanogpt_surgery.data.gpt_dataset import GPTDataset

    if isinstance(source, str):
        return text_datasets(source, tokenizer, block_size)
    known = source.header.fingerprint()
    pair = []
    for split, ids in (("train", source.train), ("validation", source.validation)):
        if len(ids) <= block_size:
            part = "to train on" if split == "train" else "held out"
            raise SurgeryError(
                f"{source.folder} has {len(ids):,} tokens {part}; a window and its last target "
                f"need {block_size + 1:,}",
                "prepare more text, with another --held-out, or use a smaller --block-size",
            )
        pair.append(GPTDataset.from_ids(ids, block_size, fingerprint=f"{split} of {known}"))
    return pair[0], pair[1]


def text_datasets(
    text: str, tokenizer: Tokenizer, block_size: int
) -> tuple[GPTDataset, GPTDataset]:
    """Windows of the first nine tenths of a text, to train on, and of the last, to validate.

    Raises:
        SurgeryError: the last tenth is shorter than a window.
    """
    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.data.text.corpus import split_by_position
    from nanogpt_surgery.data.tokenizers.tokenizer import encode_text

    train, validation = split_by_position(text)
    held_out_ids = encode_text(tokenizer, validation)
    try:
        held_out = GPTDataset.from_ids(held_out_ids, block_size)
    except SurgeryError as error:
        raise SurgeryError(
            f"the last tenth of the text, which is held out for validation, is too short: "
            f"{error.what}",
            "give a longer text, or a smaller --block-size",
        ) from None
    return GPTDataset(train, tokenizer, block_size), held_out


def say_windows(dataset: Batches, held_out: Batches) -> None:
    """How much there is to train on; of conversations a table says it."""
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset

    if not isinstance(dataset, InstructionDataset):
        say(windows_of(dataset, held_out))


def windows_of(dataset: Batches, held_out: Batches) -> str:
    """Counts of windows, and of tokens, since held-out windows overlap where others may not."""
    counts = f"{len(dataset):,} windows to train on, {len(held_out):,} held out"
    tokens = [getattr(data, "tokens", None) for data in (dataset, held_out)]
    if None in tokens:
        return counts
    return f"{counts} (of {tokens[0]:,} and {tokens[1]:,} tokens)"


def say_sources(dataset: Batches, paths: tuple[str, ...], rows: int) -> None:
    """How often a training of so many windows reads each source of a mixture."""
    from nanogpt_surgery.data.text.mixture import Mixture

    if isinstance(dataset, Mixture):
        for path, share in zip(paths, dataset.passes(rows), strict=True):
            say(f"{path}: read {share:.3g} times")
