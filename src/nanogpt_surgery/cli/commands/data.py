"""`surgery data` and `surgery tokenizer`: text and conversations made ready to train on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    CHARACTERS,
    TOKENIZER,
    Json,
    Overwrite,
    check_out,
    given,
    options_of,
)
from nanogpt_surgery.data.conversations.record_files import holds_records, warn_of_records
from nanogpt_surgery.data.text import corpus
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.report import Report
from nanogpt_surgery.runs.settings import DataSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

LINE_EVERY = 10.0  # seconds
OTHERS = ("mix", "block_size", "stride", "cache_dir", "data", "pack")
InstructionOptions: Any = options_of(DataSettings, "Instructions", OTHERS)


def prepare(
    *text: str,
    out: Path,
    tokenizer: Annotated[str, Parameter(help=TOKENIZER)] = CHARACTERS,
    held_out: float | None = None,
    workers: int = 0,
    json: Json = False,
) -> None:
    """Encode text into a folder of ids that training maps instead of loading.

    The same command goes on where it was stopped; on a finished folder it checks every byte.

    Args:
        text: files, or folders of them
        out: the folder to make: tokens.json, train.bin, validation.bin and the tokenizer
        held_out: the share for validation; by default a tenth, but at most 16 MiB of text in all
        workers: processes (0: one for each core)
    """
    from nanogpt_surgery.data.text.token_files import is_token_folder
    from nanogpt_surgery.runs.data import check_token_folder, prepare_folder

    if not text:
        raise SurgeryError("no text was named", "surgery data prepare TEXT … --out FOLDER")
    check_token_folder(out, text)
    check_no_records(text)
    warn_of_records(text)
    finished, wanted = is_token_folder(out), named_tokenizer(tokenizer)
    try:
        chunks = corpus.chunks_of(text)
        report = prepare_folder(chunks, out, wanted, held_out, workers, _progress(len(chunks)))
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on with {out}")
        sys.exit(130)
    if finished:
        say(f"{out} was finished before: every byte is as it was written")
    show(report, json)
    say(f"surgery train {out} --out … trains on it")


def _progress(chunks: int) -> Callable[[int], None]:
    """A function that says every 10 s how many chunks are done."""
    last = monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if monotonic() - last >= LINE_EVERY:
            say(f"{done:,} of {chunks:,} chunks are done")
            last = monotonic()

    return tell


def named_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer in a folder that was named; None for one that is made of characters.

    Raises:
        SurgeryError: there is none in the folder.
    """
    from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

    found = None if name == CHARACTERS else open_tokenizer(name)
    if found is None and name != CHARACTERS:
        there = "it holds no tokenizer.json" if Path(name).is_dir() else "there is no such folder"
        raise SurgeryError(
            f"no tokenizer opens from {name}: {there}",
            "surgery tokenizer train TEXT --vocab-size 4096 --out FOLDER makes one",
        )
    return found


def check_no_records(paths: Sequence[str], model: str = "MODEL") -> None:
    """Raises `SurgeryError` if a file that is to be learned as text holds records.

    As text their braces, quotes and names of fields would be learned.
    """
    from nanogpt_surgery.data.conversations.instructions import check_first_record

    for path in paths:
        if path != "-" and holds_records(path):
            check_first_record(path)
            raise SurgeryError(
                f"{path} holds questions with answers, not text",
                f"surgery finetune {model} {path} --out ADAPTER trains on the answers",
            )


def preview(
    model: str,
    *data: str,
    examples: int = 3,
    block_size: int | None = None,
    tokens: bool = False,
    instructions: InstructionOptions = None,
    json: Json = False,
) -> None:
    """Show instruction data as it is trained on, answers coloured, and count what is in it.

    Where standard output is no terminal, what is trained on stands in ⟦ ⟧.

    Args:
        model: a run, a model folder, a GGUF file or a hub name; or a tokenizer alone
        data: JSON, JSONL, CSV or TSV files of questions and answers, or of conversations
        examples: how many to show
        block_size: tokens of an example at most; the model's own by default, at most 256
        tokens: show each token by itself, with a │ after it
    """
    from nanogpt_surgery.data.conversations import instruction_dataset
    from nanogpt_surgery.data.conversations.instructions import read_examples
    from nanogpt_surgery.formats.model_file import open_tokenizer_of
    from nanogpt_surgery.runs.data import window_length

    tokenizer, context = open_tokenizer_of(model)
    length = window_length(block_size, context)
    settings = DataSettings(**given(instructions))
    found = read_examples(data, tokenizer, settings.template, settings.answers_only)
    dataset = instruction_dataset.InstructionDataset.for_tokenizer(found, tokenizer, length)
    pieces_of = instruction_dataset.preview_tokens if tokens else instruction_dataset.preview
    shown = [pieces_of(example.cut(length + 1), tokenizer) for example in found[:examples]]
    summary = dataset.counts.to_dict()
    if json:
        rows = [[{"text": text, "trained": trained} for text, trained in p] for p in shown]
        summary |= {"block_size": length, "preview": rows}
    for number, pieces in enumerate([] if json else shown):
        _print(number, pieces, len(found[number].ids), length, "│" if tokens else "")
    show(Report("instruction data", [], summary), json)
    written = f" --template {settings.template}" * (settings.template != "model")
    written += " --no-answers-only" * (not settings.answers_only)
    say(f"surgery finetune {model} {' '.join(data)}{written} --out FOLDER trains on it")


def _print(
    number: int, pieces: list[tuple[str, bool]], count: int, length: int, border: str
) -> None:
    """An example with what is trained on coloured, or in brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    cut = f", cut off after {length + 1}" if count > length + 1 else ""
    print(f"example {number + 1}: {count} tokens{cut}")
    console, text = Console(highlight=False, soft_wrap=True), Text()
    before, after = ("", "") if console.is_terminal else ("⟦", "⟧")
    for piece, trained in pieces:
        if trained:
            text.append(before + printable(piece) + after, style="bold green")
        else:
            text.append(printable(piece))
        text.append(border, style="dim")
    console.print(text)


def train_tokenizer(
    *text: str,
    out: Path,
    vocab_size: int,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Learn a byte-level BPE from text, into a folder that transformers opens.

    Merges are learnt from the first nine tenths of the text, as a training on it learns from them,
    and measured on the last.

    Args:
        text: files, folders, or - for standard input; without any, Python's own reference
        out: the folder to make: tokenizer.json, tokenizer_config.json
        vocab_size: how many tokens at most, the 256 bytes and <|endoftext|> among them
    """
    from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
    from nanogpt_surgery.formats.huggingface.tokenizer_files import save_tokenizer

    check_out(out, overwrite)
    if not text:
        say("no text was named: learning from Python's language reference")
    whole = corpus.read_texts(text) if text else corpus.python_reference()
    learnt, held_out = corpus.split_by_position(whole)
    tokenizer = BPETokenizer.train(learnt, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        say(f"the text repeats too little for {vocab_size:,} tokens")
    tokens = len(tokenizer.encode_to_numpy(held_out))
    save_tokenizer(tokenizer, out)
    summary = {
        "folder": str(out),
        "vocabulary": tokenizer.vocab_size,
        "characters_learnt_from": len(learnt),
        "held_out_characters": len(held_out),
        "held_out_tokens": tokens,
        "characters_per_token": len(held_out) / max(1, tokens),
        "bytes_per_token": len(held_out.encode()) / max(1, tokens),
    }
    show(Report("trained a tokenizer", [], summary), json)
    say(f"surgery train --tokenizer {out} … trains a model with it")
