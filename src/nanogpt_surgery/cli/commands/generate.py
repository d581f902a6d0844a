"""`surgery generate`: continue a text, or many."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import notes_afterwards, say
from nanogpt_surgery.cli.opening import Dtype, Force, OnTied, one_adapter, open_to_talk
from nanogpt_surgery.cli.sampling_options import AS_USUAL, SamplingOptions
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.memory import check_memory

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
    json: Annotated[bool, Parameter(negative="")] = False
    """print a JSON object a line: prompt, sample, text, ended, and tokens with --logprobs"""

    def check(self) -> None:
        """Raise `SurgeryError` for what is out of its range, all at once."""
        least = {"samples": 1, "batch_size": 1, "logprobs": 0}
        numbers = {name: getattr(self, name) or 0 for name in least}
        wrong = [
            f"{name} is {n}; it must be at least {least[name]}"
            for name, n in numbers.items()
            if n < least[name]
        ]
        if wrong:
            raise SurgeryError("; ".join(wrong))


ONE = ManyOptions()


def generate(
    model: str,
    *,
    prompt: str = "\n",
    prompts: Path | None = None,
    adapter: Path | None = None,
    max_new_tokens: int = 300,
    dtype: Dtype = None,
    tied: OnTied = None,
    force: Force = False,
    sampling: SamplingOptions = AS_USUAL,
    many: ManyOptions = ONE,
) -> None:
    """Continue a prompt, on standard output as it is made; or many, several times each.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    prompt
        the text to continue; - reads it from standard input
    prompts
        a file of prompts in the place of one: a line each, or JSON, JSONL, CSV or TSV with prompt
    adapter
        an adapter folder, as finetune or peft writes it
    max_new_tokens
        how many tokens at most
    """
    sampling.settings()  # what is out of its range is refused before the model is opened
    many.check()
    texts = _prompts(prompt, prompts)
    network, tokenizer = open_to_talk(model, one_adapter(adapter), dtype, tied, force)
    _say_raw_text(tokenizer, model, adapter)
    if len(texts) == many.samples == 1 and many.logprobs is None and not many.json:
        pieces = _as_it_is_made(network, tokenizer, texts[0], max_new_tokens, sampling)
    else:
        pieces = _one_by_one(network, tokenizer, texts, max_new_tokens, sampling, many)
    with notes_afterwards():
        for piece in pieces:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()


def _as_it_is_made(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    text: str,
    max_new_tokens: int,
    sampling: SamplingOptions,
) -> Iterator[str]:
    """A text, and the pieces of its continuation; what is refused is so before the text comes."""
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.text import generate_text

    pieces = generate_text(
        model,
        tokenizer,
        prompt_ids(tokenizer, text),
        max_new_tokens,
        sampling.settings(),
        stop=sampling.stop,
        seed=sampling.seed,
    )
    yield text
    empty = True
    for piece in pieces:
        empty = empty and not piece
        yield piece
    yield "\n"
    if empty:
        _say_empty(1, 1, max_new_tokens)


def _one_by_one(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingOptions,
    many: ManyOptions,
) -> Iterator[str]:
    """Each continuation as it is shown, in the order of the prompts."""
    from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
    from nanogpt_surgery.generation.text import continue_texts

    ids = [prompt_ids(tokenizer, text) for text in texts]
    listed = 8 * many.samples * len(texts)  # a reference to each prompt for each of its samples
    check_memory("the list of continuations", {"prompts": listed}, "lower --samples")
    found = continue_texts(
        model,
        tokenizer,
        [one for one in ids for _ in range(many.samples)],
        max_new_tokens,
        sampling.settings(),
        stop=sampling.stop,
        seed=sampling.seed,
        likeliest=many.logprobs or 0,
        batch_size=many.batch_size,
    )
    rows = ((text, sample) for text in texts for sample in range(1, many.samples + 1))
    empty = 0
    for (text, sample), continuation in zip(rows, found, strict=True):
        empty += not continuation.text
        record = _record(text, sample, continuation, tokenizer, many.logprobs is not None)
        yield _json_line(record) if many.json else _block(record)
    if empty:
        _say_empty(empty, many.samples * len(texts), max_new_tokens)


def _say_raw_text(tokenizer: Tokenizer, model: str, adapter: Path | None) -> None:
    """A note where the model answers messages, as a template of its own shows."""
    if getattr(tokenizer, "chat_template", None):
        with_it = f" --adapter {adapter}" if adapter else ""
        say(
            "note: this model has a chat template, and generate continues raw text; to put a "
            f'question: surgery ask {model}{with_it} "…", or surgery chat'
        )


def _say_empty(empty: int, count: int, max_new_tokens: int) -> None:
    """A note that nothing was added to a text, and why."""
    why = (
        "a token that ends a text, or --stop, came before any that is shown"
        if max_new_tokens
        else "max_new_tokens is 0"
    )
    say(f"note: nothing was added to {empty:,} of {count:,} texts: {why}")


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


def _record(
    prompt: str, sample: int, found: Continuation, tokenizer: Tokenizer, tokens: bool
) -> dict[str, Any]:
    record = {"prompt": prompt, "sample": sample, "text": found.text, "ended": found.ended}
    if tokens:
        record["tokens"] = [
            _token(tokenizer, token.id, token.log_probability)
            | {"likeliest": [_token(tokenizer, i, p) for i, p in token.likeliest.items()]}
            for token in found.tokens
        ]
    return record


def _token(tokenizer: Tokenizer, index: int, log_probability: float) -> dict[str, Any]:
    return {"id": index, "text": tokenizer.decode([index]), "logprob": log_probability}


def _json_line(record: dict[str, Any]) -> str:
    import json

    return json.dumps(record) + "\n"


def _block(record: dict[str, Any]) -> str:
    """A continuation for people, under its number; its tokens one a line."""
    lines = [f"--- sample {record['sample']}", record["prompt"] + record["text"]]
    for token in record.get("tokens", []):
        others = "  ".join(f"{t['text']!r} {t['logprob']:.3f}" for t in token["likeliest"])
        lines.append(f"  {token['logprob']:8.3f}  {token['text']!r:16}  {others}".rstrip())
    return "\n".join(lines) + "\n"
