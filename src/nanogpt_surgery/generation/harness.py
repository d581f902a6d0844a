"""A model as lm-evaluation-harness sees one; needs the extra `lm-eval`.

import lm_eval
from nanogpt_surgery import open_model
from nanogpt_surgery.generation.harness import HarnessModel

results = lm_eval.simple_evaluate(HarnessModel(*open_model("runs/english")), tasks=["piqa"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from lm_eval.api.model import LM

from nanogpt_surgery.data.conversations.chat import Message, encode_conversation, template_of
from nanogpt_surgery.data.tokenizers.tokenizer import (
    Tokenizer,
    prompt_ids,
    required_tokenizer,
    tokenizer_fingerprint,
)
from nanogpt_surgery.errors import SurgeryError, warn
from nanogpt_surgery.generation.evaluation import scored
from nanogpt_surgery.generation.settings import Engine, SamplingSettings
from nanogpt_surgery.generation.text import continue_texts
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.values import SIZE, chosen, raise_all, wrong_values

T = TypeVar("T")
ANSWER = 256  # tokens, where a task does not say


class HarnessModel(LM):  # type: ignore[misc]
    """Log-likelihoods and answers of a `SimpleGPT`, an adapter on it included.

    A text begins after the tokenizer's BOS, or else its EOS. A tokenizer with neither, as of
    characters, leaves the first token of a text without context unscored. A conversation that
    `apply_chat_template` wrote is encoded, and ends, as in `surgery chat`. What is longer than the
    model's block_size loses its beginning, with a warning.

    Args:
        model: in eval mode whatever mode it is in.
        tokenizer: the model's.
        batch_size: rows computed together.
        seed: of draws, where a task asks for them.
        engine: what computes answers, as in `generate`.
    """

    def __init__(
        self,
        model: SimpleGPT,
        tokenizer: Tokenizer | None,
        batch_size: int = 8,
        seed: int = 0,
        engine: Engine = "auto",
    ):
        super().__init__()
        raise_all(wrong_values(SIZE, {"batch_size": batch_size}))
        self.model, self.tokenizer = model, required_tokenizer(tokenizer, "the model")
        self.batch_size, self.seed, self.engine = batch_size, seed, engine
        self.template = template_of(self.tokenizer)
        self._conversations: dict[int, set[str]] = {}  # those that the template wrote, by length
        begin = getattr(tokenizer, "bos_id", None)
        begin = getattr(tokenizer, "eos_id", None) if begin is None else begin
        self.prefix: list[int] = [] if begin is None else [begin]

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """For each (context, continuation): Σ log p, and whether greedy decoding writes it."""
        pairs = [self._pair(*request.args) for request in requests]
        return self._cached("loglikelihood", requests, self._scored(pairs))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """For each (text,): Σ log p of all its tokens, each predicted once.

        Windows of block_size do not overlap, but for the last, which is as long as the others.
        """
        texts = (self.prefix + self.tokenizer.encode(*request.args) for request in requests)
        sums = (sum(score for score, _ in self._scored(self._windows(ids))) for ids in texts)
        return self._cached("loglikelihood_rolling", requests, sums)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """For each (context, arguments): what the model writes up to a stop string."""
        answers = (self._answer(*request.args) for request in requests)
        return self._cached("generate_until", requests, answers)

    def _cached(self, kind: str, requests: Sequence[Any], answers: Iterable[T]) -> list[T]:
        """Returns the answers; the harness keeps each as it comes."""
        found = []
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
            found.append(answer)
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both, and how many of them are scored: the harness's own way to cut."""
        before = context.rstrip()
        continuation = context[len(before) :] + continuation
        if before:
            encoded = self._encoder(context)
            ids = encoded(before + continuation)
            return ids, len(ids) - len(encoded(before))
        ids = self.tokenizer.encode(continuation)
        ids = ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids
        return ids, len(ids) - 1

    def _encoder(self, context: str) -> Callable[[str], list[int]]:
        """Returns the encoder of texts that begin with a context; chats are encoded as chats."""
        if self._is_conversation(context):
            return lambda text: encode_conversation(self.tokenizer, self.template, text)[0]
        return partial(prompt_ids, self.tokenizer)

    def _is_conversation(self, context: str) -> bool:
        """Whether `apply_chat_template` wrote a context, to which the task may have added."""
        return any(context[:size] in texts for size, texts in self._conversations.items())

    def _windows(self, ids: list[int]) -> list[tuple[list[int], int]]:
        block, last = self.model.config.block_size, len(ids) - 1
        spans = [(first, min(first + block, last)) for first in range(0, last, block)]
        return [(ids[max(0, end - block) : end + 1], end - first) for first, end in spans]

    def _scored(self, pairs: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For ids and how many at their end count: Σ log p, and whether each was the likeliest."""
        answers = [(0.0, True)] * len(pairs)
        order = sorted(
            (i for i, (_, n) in enumerate(pairs) if n > 0), key=lambda i: -len(pairs[i][0])
        )
        for first in range(0, len(order), self.batch_size):
            chunk = order[first : first + self.batch_size]
            texts = [torch.tensor(self._cut(*pairs[i])) for i in chunk]
            for i, (scores, likeliest) in zip(chunk, scored(self.model, texts), strict=True):
                n = pairs[i][1]
                answers[i] = float(scores[-n:].double().sum()), bool(likeliest[-n:].all())
        return answers

    def _cut(self, ids: list[int], needed: int) -> list[int]:
        block = self.model.config.block_size
        if needed > block:
            raise SurgeryError(
                f"a continuation has {needed} tokens; with one before it the model's block_size of "
                f"{block} holds {block}"
            )
        return _last(ids, block + 1)

    def _answer(self, context: str, arguments: dict[str, Any]) -> str:
        asked = {"do_sample": False, "max_gen_toks": ANSWER, "until": None} | arguments
        stop, length = asked.pop("until") or [], int(asked.pop("max_gen_toks"))
        if not asked.pop("do_sample"):
            asked["temperature"] = 0.0
        settings = chosen(SamplingSettings, None, asked)
        room = self.model.config.block_size - length
        if room < 1:
            raise SurgeryError(
                f"a task asks for answers of {length} tokens; the model's block_size is "
                f"{self.model.config.block_size}"
            )
        [found] = continue_texts(
            self.model,
            self.tokenizer,
            [_last(self._encoder(context)(context) or self.prefix, room)],
            length,
            settings,
            stop=self._stop(context, stop),
            seed=self.seed,
            engine=self.engine,
        )
        return found.text

    def _stop(self, context: str, wanted: str | Sequence[str]) -> list[str]:
        """Returns the texts that end an answer: the task's, and in a chat the template's."""
        said = [wanted] if isinstance(wanted, str) else list(wanted)
        return said + list(self.template.stop if self._is_conversation(context) else ())

    @property
    def tokenizer_name(self) -> str:
        """A name under which the harness keeps what was tokenised."""
        return tokenizer_fingerprint(self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the template that `apply_chat_template` uses."""
        return self.template.source

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model was trained to see it."""
        text = self.template.render(chat_history, add_generation_prompt)
        self._conversations.setdefault(len(text), set()).add(text)
        return text


def _last(ids: list[int], most: int) -> list[int]:
    """Returns the last ids of a text, with a warning if those are not all."""
    if len(ids) > most:
        warn(f"a text of {len(ids)} tokens loses its beginning: {most} fit")
    return ids[-most:]
