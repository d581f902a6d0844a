"""`surgery eval`: how well a model predicts a text, answers, or the right one of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanogpt_surgery.cli.chat.settings import stored_template
from nanogpt_surgery.cli.framework.console import Json, say, show
from nanogpt_surgery.cli.model_options import (
    DEFAULT_OPENING,
    AdapterFolder,
    Model,
    OpeningOptions,
    next_command,
    one_adapter,
)

if TYPE_CHECKING:
    from nanogpt_surgery.data.conversations.chat import ChatTemplate
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
    opening: OpeningOptions = DEFAULT_OPENING,
    json: Json = False,
) -> None:
    """Measure a model on a file: a text, questions with choices, or instruction data.

    A text gives the loss of each token from a sliding window: nats a token, bits a byte,
    perplexity. JSON or JSONL with prompt, choices and answer gives the share of questions whose
    right choice is the likeliest, by log-likelihood, and by that divided by characters. Other JSON
    or JSONL, CSV and TSV is instruction data: the loss on the answers alone.

    Parameters
    ----------
    file
        a text, JSON, JSONL, CSV or TSV file; a folder of texts; or - for a text on standard input
    context
        tokens in a window over a text; the model's block_size by default, at most 1024
    stride
        tokens from one window to the next; half of the context by default
    batch_size
        windows or examples computed together
    template
        how instruction data is written; auto: as the adapter was trained, else as the model's own
        template does
    """
    from nanogpt_surgery.data.conversations.record_files import has_choices, holds_records
    from nanogpt_surgery.report import Report

    adapters = one_adapter(adapter)
    opened = opening.open(model, adapters)
    talks = False
    if not holds_records(file):
        title = "each token from those before it (loss in nats a token)"
        summary = _of_text(*opened, file, context, stride, batch_size)
    elif has_choices(file):
        title, summary = "the likeliest choice", _of_choices(*opened, file)
    else:
        title, talks = "answers alone (loss in nats a token)", True
        written = _written(opened[1], template, adapters[0][1] if adapters else None)
        summary = _of_answers(*opened, file, written, batch_size)
    show(Report(f"{file}: {title}", [], summary), json)
    say(next_command(model, adapter, talks=talks))


def _written(tokenizer: Tokenizer, name: str, adapter: Path | None) -> ChatTemplate:
    """The template of this name; with auto, the one that an adapter was trained with."""
    from nanogpt_surgery.data.conversations.chat import named_template

    if name != "auto":
        return named_template(tokenizer, name)
    return stored_template(tokenizer, adapter) or named_template(tokenizer, "model")


def _of_text(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    file: str,
    context: int | None,
    stride: int | None,
    batch_size: int,
) -> dict[str, Any]:
    from nanogpt_surgery.data.conversations.record_files import warn_of_records
    from nanogpt_surgery.data.text.corpus import check_characters, read_texts
    from nanogpt_surgery.data.tokenizers.token_text import bytes_of_first
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.evaluation import perplexity

    if context is None:
        context = min(model.config.block_size, LONGEST_WINDOW)
    warn_of_records([file])
    text = read_texts([file])
    check_characters(tokenizer, [file], text)
    ids = prompt_ids(tokenizer, text)
    found = perplexity(model, ids, stride, batch_size, context)
    # The first token is not predicted: where it is not a BOS, its bytes do not count.
    begins = getattr(tokenizer, "add_bos", False)
    n_bytes = len(text.encode()) - (0 if begins else bytes_of_first(tokenizer, text, ids[0]))
    return {
        "tokens": found.tokens,
        "bytes": n_bytes,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits / n_bytes,
        "context": context,
        "stride": max(1, context // 2) if stride is None else stride,
    }


def _of_choices(model: SimpleGPT, tokenizer: Tokenizer, file: str) -> dict[str, Any]:
    from nanogpt_surgery.data.conversations.record_files import read_questions
    from nanogpt_surgery.generation.evaluation import multiple_choice

    questions = read_questions(file)
    plain, normalised = 0, 0
    for question in questions:
        found = multiple_choice(model, tokenizer, question.prompt, question.choices)
        sums, shares = [c.log_likelihood for c in found], [c.per_character for c in found]
        plain += question.answer == sums.index(max(sums))
        normalised += question.answer == shares.index(max(shares))
    count = len(questions)
    return {
        "questions": count,
        "accuracy": plain / count,
        "length_normalised_accuracy": normalised / count,
        "accuracy_by_chance": sum(1 / len(q.choices) for q in questions) / count,
    }


def _of_answers(
    model: SimpleGPT, tokenizer: Tokenizer, file: str, template: ChatTemplate, batch_size: int
) -> dict[str, Any]:
    from nanogpt_surgery.data.conversations.instructions import read_examples
    from nanogpt_surgery.generation.evaluation import answer_loss

    examples = read_examples([file], tokenizer, template)
    length = model.config.block_size + 1
    cut = sum(len(example.ids) > length for example in examples)
    if cut:
        say(f"note: {cut} conversations are longer than the block_size; their ends do not count")
    found = answer_loss(model, examples, batch_size)
    return {
        "conversations": len(examples),
        "cut": cut,
        "answer_tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "template": template.name,
    }
