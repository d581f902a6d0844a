"""`surgery eval`: how well a model predicts a text, answers, or the right one of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    AdapterFolder,
    Json,
    Model,
    OpeningOptions,
    next_command,
    one_adapter,
)
from nanogpt_surgery.data.conversations import record_files
from nanogpt_surgery.data.text.corpus import check_characters, read_texts
from nanogpt_surgery.report import Report

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

LONGEST_WINDOW = 1024


def evaluate(
    model: Model,
    file: str,
    *,
    adapter: AdapterFolder = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    template: Literal["auto", "model", "chatml", "plain"] = "auto",
    opening: OpeningOptions = OpeningOptions(),
    json: Json = False,
) -> None:
    """Measure a model on a file: a text, questions with choices, or instruction data.

    A text gives the loss of each token from a sliding window: nats a token, bits a byte,
    perplexity. JSON or JSONL with prompt, choices and answer gives the share of questions whose
    right choice is the likeliest, by log-likelihood, and by that divided by characters. Other JSON
    or JSONL, CSV and TSV is instruction data: the loss on the answers alone.

    Args:
        file: a text, JSON, JSONL, CSV or TSV file; a folder of texts; or - for a text on standard
            input
        context: tokens in a window over a text; the model's block_size by default, at most 1024
        stride: tokens from one window to the next; half of the context by default
        batch_size: windows or examples computed together
        template: how instruction data is written; auto: as the adapter was trained, else as the
            model's own template does
    """
    from nanogpt_surgery.generation.evaluation import measure_choices

    adapters = one_adapter(adapter)
    opened = opening.open(model, adapters)
    if talks := record_files.holds_records(file) and not record_files.has_choices(file):
        title = "answers alone (loss in nats a token)"
        summary = _of_answers(*opened, file, template, dict(adapters).get("default"), batch_size)
    elif record_files.holds_records(file):
        title = "the likeliest choice"
        summary = measure_choices(*opened, record_files.read_questions(file))
    else:
        title = "each token from those before it (loss in nats a token)"
        summary = _of_text(*opened, file, stride, batch_size, context)
    show(Report(f"{file}: {title}", [], summary), json)
    say(next_command(model, adapter, talks=talks))


def _of_text(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    file: str,
    stride: int | None,
    batch_size: int,
    context: int | None,
) -> dict[str, Any]:
    from nanogpt_surgery.generation.evaluation import measure_text

    record_files.warn_of_records([file])
    text = read_texts([file])
    check_characters(tokenizer, [file], text)
    if context is None:
        context = min(model.config.block_size, LONGEST_WINDOW)
    return measure_text(model, tokenizer, text, stride, batch_size, context)


def _of_answers(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    file: str,
    template: str,
    adapter: Path | None,
    batch_size: int,
) -> dict[str, Any]:
    from nanogpt_surgery.data.conversations.instructions import read_examples
    from nanogpt_surgery.formats.opening import chat_template
    from nanogpt_surgery.generation.evaluation import measure_answers

    written = chat_template(tokenizer, template, adapter)
    summary = measure_answers(model, read_examples([file], tokenizer, written), batch_size)
    if cut := summary["cut"]:
        say(f"note: {cut} conversations are longer than the block_size; their ends do not count")
    return summary | {"template": written.name}
