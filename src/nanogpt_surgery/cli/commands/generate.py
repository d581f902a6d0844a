"""`surgery generate`: continue a text, or many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import notes_afterwards, say, write
from nanogpt_surgery.cli.model_options import (
    DEFAULT_OPENING,
    DEFAULT_SAMPLING,
    AdapterFolder,
    Model,
    OpeningOptions,
    SamplingOptions,
    one_adapter,
    say_engine,
)
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.values import SIZE, SIZE_OR_0, raise_all, wrong_values

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.generation.text import Continuation
    from nanogpt_surgery.model.simple_gpt import SimpleGPT


@Parameter(name="*")
@dataclass(frozen=True)
class ManyOptions:
    """How many continuations are made, and what is shown of them."""

    samples: int = 1
    """how many continuations of each prompt"""
    logprobs: int | None = None
    """show the log-probability of each token, and so many of the likeliest beside it"""
    batch_size: int = 8
    """how many continuations are computed together"""
    json: bool = False
    """print a JSON object a line: prompt, sample, text, ended, engine (what computed the tokens,
    and why it was not the compiled decoder), and tokens with --logprobs"""

    def check(self) -> None:
        """Raises `SurgeryError` for what is out of its range, all at once."""
        sizes = {"samples": self.samples, "batch_size": self.batch_size}
        logprobs = {"logprobs": self.logprobs or 0}
        raise_all(wrong_values(SIZE, sizes) + wrong_values(SIZE_OR_0, logprobs))

    def is_one_text(self, texts: Sequence[str]) -> bool:
        """Whether one continuation is shown, and nothing beside it."""
        return len(texts) == self.samples == 1 and self.logprobs is None and not self.json


DEFAULT_MANY = ManyOptions()


def generate(
    model: Model,
    *,
    prompt: str = "\n",
    prompts: Path | None = None,
    adapter: AdapterFolder = None,
    max_new_tokens: int = 300,
    opening: OpeningOptions = DEFAULT_OPENING,
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    many: ManyOptions = DEFAULT_MANY,
) -> None:
    """Continue a prompt, on standard output as it is made; or many, several times each.

    Parameters
    ----------
    prompt
        the text to continue; - reads it from standard input
    prompts
        a file of prompts in the place of one: a line each, or JSON, JSONL, CSV or TSV with prompt
    max_new_tokens
        how many tokens at most
    """
    draw = sampling.arguments() | {"max_new_tokens": max_new_tokens}
    many.check()
    texts = _prompts(prompt, prompts)
    network, tokenizer = opening.open(model, one_adapter(adapter))
    if getattr(tokenizer, "chat_template", None):
        with_it = f" --adapter {adapter}" if adapter else ""
        say(
            "note: this model has a chat template, and generate continues raw text; to put a "
            f'question: surgery ask {model}{with_it} "…", or surgery chat'
        )
    say_engine(network, draw["engine"])
    with notes_afterwards():
        if many.is_one_text(texts):
            write(_as_it_is_made(network, tokenizer, texts[0], draw))
        else:
            write(_one_by_one(network, tokenizer, texts, draw, many))


def _prompts(prompt: str, file: Path | None) -> list[str]:
    from nanogpt_surgery.data.conversations.record_files import holds_records, read_records
    from nanogpt_surgery.data.text.corpus import read_texts

    if file is None:
        return [read_texts(["-"]).replace("\r\n", "\n") if prompt == "-" else prompt]
    if holds_records(file):
        found = [r.get("prompt") if isinstance(r, dict) else r for r in read_records(file)]
    else:
        lines = read_texts([file]).replace("\r\n", "\n").split("\n")
        found = list(filter(None, lines))
    wrong = [number for number, text in enumerate(found, 1) if not isinstance(text, str)]
    if wrong or not found:
        what = f"record {wrong[0]} has no prompt" if wrong else "there are none"
        raise SurgeryError(
            f"{file} does not hold prompts: {what}", 'a line each, or {"prompt": "Once"} in JSONL'
        )
    return [str(text) for text in found]


def _as_it_is_made(
    model: SimpleGPT, tokenizer: Tokenizer, text: str, draw: dict[str, Any]
) -> Iterator[str]:
    """A text, and the pieces of its continuation; what is refused is so before the text comes."""
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.text import generate_text

    pieces = generate_text(model, tokenizer, prompt_ids(tokenizer, text), **draw)
    yield text
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    yield "\n"
    _say_empty(int(empty), 1, draw)


def _one_by_one(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    draw: dict[str, Any],
    many: ManyOptions,
) -> Iterator[str]:
    """Each continuation as it is shown, in the order of the prompts."""
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.text import continue_texts

    ids = [prompt_ids(tokenizer, text) for text in texts]
    listed = 8 * many.samples * len(texts)  # a reference to each prompt for each of its samples
    check_memory("the list of continuations", {"prompts": listed}, "lower --samples")
    prompts = [one for one in ids for _ in range(many.samples)]
    several = draw | {"likeliest": many.logprobs or 0, "batch_size": many.batch_size}
    found = continue_texts(model, tokenizer, prompts, **several)
    rows = ((text, sample) for text in texts for sample in range(1, many.samples + 1))
    empty = 0
    for (text, sample), continuation in zip(rows, found, strict=True):
        empty += not continuation.text
        record = {"prompt": text, "sample": sample, "text": continuation.text}
        record |= {"ended": continuation.ended, "engine": str(continuation.engine)}
        if many.logprobs is not None:
            record["tokens"] = _tokens(continuation, tokenizer)
        yield json.dumps(record) + "\n" if many.json else _block(record)
    _say_empty(empty, len(prompts), draw)


def _tokens(found: Continuation, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each token, and the likeliest in its place, with their log-probabilities."""

    def shown(index: int, log_probability: float) -> dict[str, Any]:
        return {"id": index, "text": tokenizer.decode([index]), "logprob": log_probability}

    return [
        shown(token.id, token.log_probability)
        | {"likeliest": [shown(*pair) for pair in token.likeliest.items()]}
        for token in found.tokens
    ]


def _block(record: dict[str, Any]) -> str:
    """A continuation for people, under its number; its tokens one a line."""
    lines = [f"--- sample {record['sample']}", record["prompt"] + record["text"]]
    for token in record.get("tokens", []):
        others = "  ".join(f"{t['text']!r} {t['logprob']:.3f}" for t in token["likeliest"])
        lines.append(f"  {token['logprob']:8.3f}  {token['text']!r:16}  {others}".rstrip())
    return "\n".join(lines) + "\n"


def _say_empty(empty: int, count: int, draw: dict[str, Any]) -> None:
    """A note that nothing was added to some of the texts, and why."""
    why = (
        "a token that ends a text, or --stop, came before any that is shown"
        if draw["max_new_tokens"]
        else "max_new_tokens is 0"
    )
    if empty:
        say(f"note: nothing was added to {empty:,} of {count:,} texts: {why}")
