"""`surgery eval`: how well a model predicts a text, answers, or the right one of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.instruction_data import TemplateName
from nanogpt_surgery.cli.next_command import say_next
from nanogpt_surgery.cli.opening import Dtype, Force, OnTied, one_adapter, open_to_talk

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.report import Report

LONGEST_WINDOW = 1024


def evaluate(
    model: str,
    file: str,
    *,
    adapter: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    template: TemplateName = "model",
    dtype: Dtype = None,
    tied: OnTied = None,
    force: Force = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Measure a model on a file: a text, questions with choices, or instruction data.

    A text gives the loss of each token from a sliding window: nats a token, bits a byte,
    perplexity. JSON or JSONL with prompt, choices and answer gives the share of questions whose
    right choice is the likeliest, by log-likelihood, and by that divided by characters. Other JSON
    or JSONL, CSV and TSV is instruction data: the loss on the answers alone.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    file
        a text, JSON, JSONL, CSV or TSV file; a folder of texts; or - for a text on standard input
    adapter
        an adapter folder, as finetune or peft writes it
    context
        tokens in a window over a text; the model's block_size by default, at most 1024
    stride
        tokens from one window to the next; half of the context by default
    batch_size
        windows or examples computed together
    template
        how instruction data is written: as the model's own template does, or as one of ours
    json
        print the report as JSON
    """
    network, tokenizer = open_to_talk(model, one_adapter(adapter), dtype, tied, force)
    kind = _kind_of(file)
    if kind == "text":
        report = _text_report(network, tokenizer, file, context, stride, batch_size)
    elif kind == "choices":
        report = _choice_report(network, tokenizer, file)
    else:
        report = _answer_report(network, tokenizer, file, template, batch_size)
    show(report, json)
    say_next(model, adapter, talks=kind == "answers")


def _kind_of(file: str) -> str:
    from nanogpt_surgery.data.conversations.record_files import has_choices, holds_records

    if not holds_records(file):
        return "text"
    return "choices" if has_choices(file) else "answers"


def _text_report(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    file: str,
    context: int | None,
    stride: int | None,
    batch_size: int,
) -> Report:
    from nanogpt_surgery.cli.sources import say_data
    from nanogpt_surgery.data.text.corpus import check_characters, read_texts
    from nanogpt_surgery.data.tokenizers.token_text import bytes_of_first
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.evaluation import perplexity
    from nanogpt_surgery.report import Report

    if context is None:
        context = min(model.config.block_size, LONGEST_WINDOW)
    say_data((file,))
    text = read_texts([file])
    check_characters(tokenizer, [file], text)
    ids = prompt_ids(tokenizer, text)
    found = perplexity(model, ids, stride, batch_size, context)
    # The first token is not predicted: where it is not a BOS, its bytes do not count.
    begins = getattr(tokenizer, "add_bos", False)
    n_bytes = len(text.encode()) - (0 if begins else bytes_of_first(tokenizer, text, ids[0]))
    summary = {
        "tokens": found.tokens,
        "bytes": n_bytes,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits / n_bytes,
        "context": context,
        "stride": max(1, context // 2) if stride is None else stride,
    }
    return Report(f"{file}: each token from those before it (loss in nats a token)", [], summary)


def _choice_report(model: SimpleGPT, tokenizer: Tokenizer, file: str) -> Report:
    from nanogpt_surgery.data.conversations.record_files import read_questions
    from nanogpt_surgery.generation.evaluation import multiple_choice
    from nanogpt_surgery.report import Report

    questions = read_questions(file)
    plain, normalised = 0, 0
    for question in questions:
        found = multiple_choice(model, tokenizer, question.prompt, question.choices)
        plain += question.answer == max(range(len(found)), key=lambda i: found[i].log_likelihood)
        normalised += question.answer == max(
            range(len(found)), key=lambda i: found[i].per_character
        )
    count = len(questions)
    summary = {
        "questions": count,
        "accuracy": plain / count,
        "length_normalised_accuracy": normalised / count,
        "accuracy_by_chance": sum(1 / len(q.choices) for q in questions) / count,
    }
    return Report(f"{file}: the likeliest choice", [], summary)


def _answer_report(
    model: SimpleGPT, tokenizer: Tokenizer, file: str, name: TemplateName, batch_size: int
) -> Report:
    from nanogpt_surgery.data.conversations.chat import template_of
    from nanogpt_surgery.data.conversations.instructions import (
        check_conversations,
        encode_conversations,
        read_conversations,
    )
    from nanogpt_surgery.generation.evaluation import answer_loss
    from nanogpt_surgery.report import Report

    template = template_of(tokenizer)
    if name != "model":
        template = replace(template, source=name)
    conversations = read_conversations(file)
    check_conversations(conversations, tokenizer)
    examples = encode_conversations(conversations, tokenizer, template)
    length = model.config.block_size + 1
    cut = sum(len(example.ids) > length for example in examples)
    if cut:
        say(f"note: {cut} conversations are longer than the block_size; their ends do not count")
    found = answer_loss(model, examples, batch_size)
    summary = {
        "conversations": len(examples),
        "cut": cut,
        "answer_tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "template": template.name,
    }
    return Report(f"{file}: answers alone (loss in nats a token)", [], summary)
