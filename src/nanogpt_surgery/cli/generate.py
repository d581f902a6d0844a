"""`surgery generate`: continue a text, or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.options import given, options_of
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.generation.settings import SamplingSettings

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizer import Tokenizer
    from nanogpt_surgery.generation.batch_text import Continuation

SamplingOptions: Any = options_of(SamplingSettings, "Sampling", leave_out=("logit_bias",))


def generate(
    model: str,
    *,
    prompt: str = "\n",
    prompts: Path | None = None,
    adapter: Path | None = None,
    max_new_tokens: int = 300,
    samples: int = 1,
    logprobs: int | None = None,
    batch_size: int = 8,
    stop: Annotated[list[str] | None, Parameter(group="Sampling", negative="")] = None,
    logit_bias: Annotated[list[str] | None, Parameter(group="Sampling", negative="")] = None,
    seed: Annotated[int | None, Parameter(group="Sampling")] = None,
    sampling: SamplingOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Continue a prompt, on standard output as it is made; or many, several times each.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    prompt
        the text to continue; - reads it from standard input
    prompts
        a file of prompts in the place of one: a line each, or JSON or JSONL with prompt
    adapter
        an adapter folder, as finetune or peft writes it
    max_new_tokens
        how many tokens at most
    samples
        how many continuations of each prompt
    logprobs
        show the log-probability of each token, and so many of the likeliest beside it
    batch_size
        how many continuations are computed together
    stop
        a text that ends the answer and is not shown; may be given several times
    logit_bias
        ID=BIAS, added to the logit of an id; -inf bans it; may be given several times
    seed
        of the draw, one more for each next; without it each call draws differently
    json
        print a JSON object a line: prompt, sample, text, ended, and tokens with --logprobs
    """
    from nanogpt_surgery.cli.opening import open_to_talk
    from nanogpt_surgery.data.tokenizer import prompt_ids
    from nanogpt_surgery.generation.batch_text import continue_texts
    from nanogpt_surgery.generation.text import generate_text

    settings = SamplingSettings(**given(sampling), logit_bias=_biases(logit_bias or ()))
    _check_counts(samples, batch_size, logprobs)
    texts = _prompts(prompt, prompts)
    network, tokenizer = open_to_talk(model, {} if adapter is None else {"default": adapter})
    ids = [prompt_ids(tokenizer, text) for text in texts]
    if len(texts) == samples == 1 and logprobs is None and not json:
        pieces = generate_text(
            network, tokenizer, ids[0], max_new_tokens, settings, stop=stop or (), seed=seed
        )
        _write(texts[0])
        for piece in pieces:
            _write(piece)
        _write("\n")
        return
    rows = [(text, sample) for text in texts for sample in range(samples)]
    found = continue_texts(
        network,
        tokenizer,
        [one for one in ids for _ in range(samples)],
        max_new_tokens,
        settings,
        stop=stop or (),
        seed=seed,
        likeliest=logprobs or 0,
        batch_size=batch_size,
    )
    for (text, sample), continuation in zip(rows, found, strict=True):
        record = _record(text, sample, continuation, tokenizer, logprobs is not None)
        _write(_json_line(record) if json else _block(record))


def _prompts(prompt: str, file: Path | None) -> list[str]:
    from nanogpt_surgery.data.corpus import read_texts
    from nanogpt_surgery.data.instructions import read_records

    if file is None:
        return [read_texts(["-"]).replace("\r\n", "\n") if prompt == "-" else prompt]
    if file.suffix in (".json", ".jsonl"):
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


def _biases(written: Any) -> dict[int, float]:
    biases = {}
    for text in written:
        index, _, bias = text.partition("=")
        try:
            biases[int(index)] = float(bias)
        except ValueError:
            raise SurgeryError(
                f"--logit-bias {text} is not ID=BIAS", "--logit-bias 42=-inf bans the id 42"
            ) from None
    return biases


def _check_counts(samples: int, batch_size: int, logprobs: int | None) -> None:
    least = {"samples": (samples, 1), "batch_size": (batch_size, 1), "logprobs": (logprobs or 0, 0)}
    wrong = [
        f"{name} is {n}; it must be at least {low}" for name, (n, low) in least.items() if n < low
    ]
    if wrong:
        raise SurgeryError("; ".join(wrong))


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
    lines = [f"--- sample {record['sample'] + 1}", record["prompt"] + record["text"]]
    for token in record.get("tokens", []):
        others = "  ".join(f"{t['text']!r} {t['logprob']:.3f}" for t in token["likeliest"])
        lines.append(f"  {token['logprob']:8.3f}  {token['text']!r:16}  {others}".rstrip())
    return "\n".join(lines) + "\n"


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
