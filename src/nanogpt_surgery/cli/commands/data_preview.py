"""`surgery data preview`: which tokens of instruction data are trained on."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.cli.framework.console import Json, say, show
from nanogpt_surgery.cli.framework.options import given, options_of
from nanogpt_surgery.cli.model_options import InstructionSettings
from nanogpt_surgery.errors import printable

InstructionOptions: Any = options_of(
    InstructionSettings, "Instructions", leave_out=("data", "pack")
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

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name; or a tokenizer alone
    data
        JSON, JSONL, CSV or TSV files of questions and answers, or of conversations
    examples
        how many to show
    block_size
        tokens of an example at most; the model's own by default, at most 256
    tokens
        show each token by itself, with a │ after it
    """
    from nanogpt_surgery.data.conversations import instruction_dataset
    from nanogpt_surgery.data.conversations.instructions import read_examples
    from nanogpt_surgery.formats.model_file import open_tokenizer_of
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.data import window_length

    tokenizer, context = open_tokenizer_of(model)
    length = window_length(block_size, context)
    settings = InstructionSettings(**given(instructions))
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
