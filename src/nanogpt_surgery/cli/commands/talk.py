"""`surgery generate`, `ask`, `chat`: a text continued, a question answered, a conversation."""

from __future__ import annotations

import json as json_module
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.chat import ChatSettings, Session, lines_typed
from nanogpt_surgery.cli.framework.console import notes_afterwards, say, write
from nanogpt_surgery.cli.framework.options import (
    AdapterFolder,
    Model,
    TalkOptions,
    WritingOptions,
    named_adapters,
    one_adapter,
    say_accepted,
    say_engine,
    typed_or_read,
)
from nanogpt_surgery.data.conversations.record_files import read_prompts
from nanogpt_surgery.errors import SurgeryError, printable
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.values import SIZE, SIZE_OR_0, raise_all, wrong_values

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.generation.conversation import Conversation
    from nanogpt_surgery.generation.text import Continuation
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

TWO_COLUMNS = 100  # characters of a terminal that has room for two answers side by side


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


def generate(
    model: Model,
    *,
    prompt: str = "\n",
    prompts: Path | None = None,
    adapter: AdapterFolder = None,
    max_new_tokens: int = 300,
    writing: WritingOptions = WritingOptions(),
    many: ManyOptions = ManyOptions(),
) -> None:
    """Continue a prompt, on standard output as it is made; or many, several times each.

    Args:
        prompt: the text to continue; - reads it from standard input
        prompts: a file of prompts in the place of one: a line each, or JSON, JSONL, CSV or TSV with
            prompt
        max_new_tokens: how many tokens at most
    """
    draw = writing.sampling.arguments() | {"max_new_tokens": max_new_tokens}
    many.check()
    texts = [typed_or_read(prompt)] if prompts is None else read_prompts(prompts)
    network, tokenizer = writing.opening.open(model, one_adapter(adapter))
    if getattr(tokenizer, "chat_template", None):
        with_it = f" --adapter {adapter}" if adapter else ""
        say(
            "note: this model has a chat template, and generate continues raw text; to put a "
            f'question: surgery ask {model}{with_it} "…", or surgery chat'
        )
    one = len(texts) == many.samples == 1 and many.logprobs is None and not many.json
    draft = writing.draft(tokenizer)
    draw["draft"] = draft
    with writing.steering.steering(network), notes_afterwards():
        say_engine(network, draw["engine"])
        if one:
            write(_as_it_is_made(network, tokenizer, texts[0], draw))
        else:
            write(_one_by_one(network, tokenizer, texts, draw, many))
        say_accepted(draft)


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
        yield json_module.dumps(record) + "\n" if many.json else _block(record)
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


def ask(
    model: Model,
    question: str,
    *,
    adapter: AdapterFolder = None,
    compare: bool = False,
    talk: TalkOptions = TalkOptions(),
    writing: WritingOptions = WritingOptions(),
    json: bool = False,
) -> None:
    """Ask a model one question; the answer alone is written on standard output.

    With --compare the model answers twice, by the same seed: as it is, and with its adapter and the
    directions of --steer; side by side on a wide terminal, one under the other elsewhere.

    Args:
        question: what is asked; - reads it from standard input
        compare: show the answer of the model as it is beside that with the adapter and --steer
        json: print a JSON object: question, answer, ended (stop or length), seed, engine (what
            computed it, and why); with --compare also base_answer and base_ended, with a draft also
            the numbers of tokens drafted and accepted
    """
    settings = ChatSettings(talk.max_new_tokens, **writing.sampling.arguments())
    steering, adapters = writing.steering, one_adapter(adapter)
    added = [*([str(adapter)] if adapter else []), *steering.steer]
    if compare and not added:
        raise SurgeryError("there is nothing to compare the model with", "add --adapter FOLDER")
    asked = _question(question)
    network, tokenizer = writing.opening.open(model, adapters)
    draft = writing.draft(tokenizer)
    seed = random.randrange(2**31) if settings.seed is None else settings.seed  # of both answers
    settings = replace(settings, draft=draft, seed=seed)
    fresh = talk.conversation(network, tokenizer, adapters[0][1] if adapters else None)
    sides = {"": fresh}
    answers = {"": _answered(fresh, asked, settings, steering.steering(network))}
    if compare:
        sides = {"base_": copy(fresh)} | sides
        answers["base_"] = _answered(sides["base_"], asked, settings, _without_adapters(network))
    known = {"seed": seed, "engine": steering.say_engine(network, settings.engine)}
    with notes_afterwards():
        if json:
            print(_as_json(asked, sides, answers, known, settings))
        elif compare:
            say(f"both answers are drawn by the seed {seed}")
            _print_both(answers, added)
        else:
            write(answers[""])
    _say_endings(sides, settings)


def _question(text: str) -> str:
    asked = typed_or_read(text).removesuffix("\n" if text == "-" else "")
    if not asked.strip():
        raise SurgeryError("the question is empty", 'surgery ask MODEL "Who are you?"')
    return asked


def _answered(
    talk: Conversation, question: str, settings: ChatSettings, so: AbstractContextManager[None]
) -> Iterator[str]:
    """The pieces of an answer, with a line's end, by the model as it is within a context."""
    with so:
        yield from talk.ask(question, **vars(settings))
    yield "\n"


def _without_adapters(model: SimpleGPT) -> AbstractContextManager[None]:
    from nanogpt_surgery.interpret.comparison import without
    from nanogpt_surgery.lora.layer import LoRALayer

    return without(layer for layer in model.modules() if isinstance(layer, LoRALayer))


def _say_endings(sides: dict[str, Conversation], settings: ChatSettings) -> None:
    """Notes about each answer that is empty or was cut off, and about the draft."""
    say_accepted(settings.draft)
    most = settings.max_new_tokens
    for side, talk in sides.items():
        name = "the base's answer" if side else "the answer"
        if talk.cut_off:
            why = "the model's context is full" if talk.room < most else "--max-new-tokens"
            say(f"note: {name} was cut off after {talk.room:,} tokens ({why})")
        elif not talk.messages[-1]["content"].strip():
            say(
                f"note: {name} is empty: the first thing the model said was the end of its turn; "
                "another --seed or --temperature may give one"
            )


def _as_json(
    question: str,
    sides: dict[str, Conversation],
    answers: dict[str, Iterator[str]],
    known: dict[str, Any],
    settings: ChatSettings,
) -> str:
    """A question and its answers, made now, as a JSON object."""
    found: dict[str, Any] = {"question": question}
    if system := sides[""].system:
        found["system"] = system
    for side, talk in sides.items():
        found[f"{side}answer"] = "".join(answers[side]).removesuffix("\n")
        found[f"{side}ended"] = "length" if talk.cut_off else "stop"
    if draft := settings.draft:
        known |= {"drafted": draft.drafted, "accepted": draft.accepted}
    return json_module.dumps(found | known, ensure_ascii=False, indent=2)


def _print_both(answers: dict[str, Iterator[str]], added: list[str]) -> None:
    """Answers under their headings: side by side where there is room."""
    base = "without adapter" if Path(added[0]).is_dir() else "without --steer"
    answers = {base: answers["base_"], f"with {', '.join(added)}": answers[""]}
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or width < TWO_COLUMNS:
        for heading, pieces in answers.items():
            print(printable(f"--- {heading}"))
            write(pieces)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3), expand=True)
    for heading in answers:
        table.add_column(Text(printable(heading), "bold"), ratio=1, overflow="fold")
    table.show_header = True
    table.add_row(*(Text(printable("".join(p).strip("\n"))) for p in answers.values()))
    Console(width=width, highlight=False).print(table)


def chat(
    model: Model,
    *,
    adapter: list[str] | None = None,
    talk: TalkOptions = TalkOptions(),
    writing: WritingOptions = WritingOptions(),
) -> None:
    """Talk with a model; answers appear as they are made, and Ctrl-C stops one.

    Lines that begin with / are commands: /help lists them.

    Args:
        adapter: NAME=FOLDER, or a folder; may be given several times, the first takes part
    """
    settings = ChatSettings(talk.max_new_tokens, **writing.sampling.arguments())
    adapters = named_adapters(adapter or ())
    network, tokenizer = writing.opening.open(model, adapters)
    settings = replace(settings, draft=writing.draft(tokenizer))
    folders: dict[str, Path | None] = {"": None, **dict(adapters)}
    templates = {name: talk.template_for(tokenizer, place) for name, place in folders.items()}
    first = adapters[0][1] if adapters else None
    session = Session(talk.conversation(network, tokenizer, first), settings, templates)
    if adapters:
        names = [name for name, _ in adapters]
        say(f"adapters: {', '.join(names)}; {names[0]} takes part")
    with writing.steering.steering(network):
        say_engine(network, settings.engine)
        say("/help lists the commands, /exit leaves; Ctrl-C stops an answer")
        for line in lines_typed():
            if not session.hear(line):
                break
    say_accepted(settings.draft)
