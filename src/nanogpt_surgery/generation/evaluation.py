"""How well a model predicts a text, and which of several answers it finds likeliest.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.conversations.instructions import Example
from nanogpt_surgery.data.conversations.record_files import Question
from nanogpt_surgery.data.tokenizers.token_text import bytes_of_first
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.memory import check_memory
from nanogpt_surgery.model.finite import not_finite
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.values import SIZE, raise_all, wrong_values

POSITIONS = 1024  # whose logits are held at once
_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted."""

    loss: float
    """mean of −ln p over the predicted tokens, in nats"""
    tokens: int
    """how many were predicted: all but the first"""

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model wavers, on average."""
        return math.exp(self.loss) if self.loss < _LARGEST_EXPONENT else math.inf

    @property
    def bits(self) -> float:
        """The bits that it takes to write the predicted tokens with the model."""
        return self.loss * self.tokens / math.log(2)


@check_arguments
def perplexity(
    model: SimpleGPT,
    ids: Sequence[int] | Tensor,
    stride: int | None = None,
    batch_size: int = 8,
    context: int | None = None,
) -> Perplexity:
    """Predict each token of a text but the first, once.

    Windows of `context` tokens begin every `stride` tokens, and of each only the tokens that no
    window before it has predicted count: each has then at least context − stride tokens before it.
    A small stride costs more and is closer to what the model knows.

    Args:
        model: left in the mode it is in; computed in eval mode.
        ids: of the text, (N,).
        stride: half of the context by default; the context for windows that do not overlap.
        batch_size: windows in a pass.
        context: tokens in a window; the model's block_size by default.

    Raises:
        SurgeryError: the text has less than two tokens, or the stride, the context or the
            batch_size is out of range.
    """
    raise_all(wrong_values(SIZE, {"batch_size": batch_size}))
    text = torch.as_tensor(ids).flatten().long()
    most = model.config.block_size
    block = most if context is None else context
    stride = max(1, block // 2) if stride is None else stride
    if len(text) < 2:
        raise SurgeryError(f"the text has {len(text)} tokens; perplexity needs at least 2")
    if not 1 <= block <= most:
        raise SurgeryError(f"context is {block}; it must be from 1 to the block_size of {most}")
    if not 1 <= stride <= block:
        raise SurgeryError(f"stride is {stride}; it must be from 1 to the context of {block}")
    total, done = 0.0, 0
    starts = list(range(0, max(1, len(text) - 1 - block + stride), stride))
    for first in range(0, len(starts), batch_size):
        chunk = starts[first : first + batch_size]
        scores = scored(model, [text[s : s + block + 1] for s in chunk])
        for start, (row, _) in zip(chunk, scores, strict=True):
            new = start + len(row) - done  # targets that no window before has predicted
            total -= float(row[len(row) - new :].double().sum())
            done += new
    assert done == len(text) - 1, f"{done} of {len(text) - 1} tokens were predicted"
    return Perplexity(total / done, done)


def scored(model: SimpleGPT, texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each text (T,), of each token but the first: ln p, and whether it is the likeliest.

    Both are (T − 1,). Shorter rows are padded on the right, where no token of theirs can see.
    Logits are made for a few positions at a time, so those of all are never held at once.

    Raises:
        NotFiniteError: one of the logits of a text is no finite number.
    """
    longest = max(map(len, texts))
    check_memory(
        f"a pass over {len(texts):,} rows of {longest:,} tokens",
        {"hidden states": 2 * len(texts) * longest * model.config.n_embd * 2},  # at least bfloat16
        "lower batch_size or context",
    )
    device = next(model.parameters()).device
    rows = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(device)  # (B, T)
    with eval_mode(model), torch.inference_mode():
        hidden = model.hidden(rows[:, :-1]).flatten(0, 1)  # (B (T − 1), C)
        parts = zip(hidden.split(POSITIONS), rows[:, 1:].flatten().split(POSITIONS), strict=True)
        found = [_scores(model.lm_head(h).float(), targets) for h, targets in parts]
    chosen, likeliest, finite = (
        torch.cat(part).view(len(texts), -1).cpu() for part in zip(*found, strict=True)
    )  # (B, T − 1) each
    lengths = [len(text) - 1 for text in texts]
    for i, n in enumerate(lengths):
        if not bool(finite[i, :n].all()):
            raise not_finite(model, partial(model, rows[i : i + 1, :n]))
    return [(chosen[i, :n], likeliest[i, :n]) for i, n in enumerate(lengths)]


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (N, V): ln p of the targets, whether it is the largest, whether all are finite."""
    chosen = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)  # (N,)
    return chosen, logits.argmax(-1) == targets, logits.isfinite().all(-1)


def answer_loss(model: SimpleGPT, examples: Sequence[Example], batch_size: int = 8) -> Perplexity:
    """How well the trained tokens of conversations are predicted, those within the block_size.

    Raises:
        SurgeryError: none of them lies within the block_size, or the batch_size is out of range.
    """
    raise_all(wrong_values(SIZE, {"batch_size": batch_size}))
    total, count, length = 0.0, 0, model.config.block_size + 1
    for first in range(0, len(examples), batch_size):
        chunk = examples[first : first + batch_size]
        texts = [torch.tensor(example.ids[:length]) for example in chunk]
        for example, (scores, _) in zip(chunk, scored(model, texts), strict=True):
            trained = torch.tensor(example.trained[1:length])
            total -= float(scores[trained].double().sum())
            count += int(trained.sum())
    if not count:
        raise SurgeryError(f"no answer lies within the block_size of {length - 1}")
    return Perplexity(total / count, count)


@dataclass(frozen=True)
class Choice:
    """One answer and how likely it is."""

    text: str
    log_likelihood: float
    """the sum over its tokens, in nats"""
    tokens: int

    @property
    def per_character(self) -> float:
        """The log-likelihood divided by its length, which does not favour short answers."""
        return self.log_likelihood / max(1, len(self.text))


@check_arguments
def multiple_choice(
    model: SimpleGPT, tokenizer: Tokenizer, question: str, answers: Sequence[str]
) -> list[Choice]:
    """How likely each answer is as the continuation of a question, in the order given.

    An answer is encoded together with the question, since a token may reach over the border; it is
    scored from the first token that differs from the question's own.

    Raises:
        SurgeryError: no answers, an empty one, or question and answer outgrow the block_size.
    """
    if not answers or not all(answers):
        raise SurgeryError("a multiple choice needs answers, and none of them empty")
    before = prompt_ids(tokenizer, question)
    texts = [prompt_ids(tokenizer, question + answer) for answer in answers]
    longest, block = max(map(len, texts)), model.config.block_size
    if longest > block + 1:
        raise SurgeryError(f"question and answer have {longest} tokens, the block_size is {block}")
    starts = [max(1, _common(before, text)) for text in texts]
    scores = scored(model, [torch.tensor(text) for text in texts])
    return [
        Choice(answer, float(row[start - 1 :].double().sum()), len(row) - start + 1)
        for answer, (row, _), start in zip(answers, scores, starts, strict=True)
    ]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two texts begin with together; the last of the second is never among them."""
    most = min(len(left), len(right) - 1)
    return next((i for i in range(most) if left[i] != right[i]), most)


def measure_text(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    text: str,
    stride: int | None = None,
    batch_size: int = 8,
    context: int | None = None,
) -> dict[str, Any]:
    """Measures `perplexity` on a text: loss in nats a token, and bits for each of its bytes."""
    context = model.config.block_size if context is None else context
    stride = max(1, context // 2) if stride is None else stride
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
        "stride": stride,
    }


def measure_choices(
    model: SimpleGPT, tokenizer: Tokenizer, questions: Sequence[Question]
) -> dict[str, Any]:
    """Returns the share of questions whose right choice is the likeliest, beside that by chance."""
    plain, normalised = 0, 0
    for question in questions:
        found = multiple_choice(model, tokenizer, question.prompt, question.choices)
        right = found[question.answer]
        plain += right is max(found, key=lambda choice: choice.log_likelihood)
        normalised += right is max(found, key=lambda choice: choice.per_character)
    count = len(questions)
    return {
        "questions": count,
        "accuracy": plain / count,
        "length_normalised_accuracy": normalised / count,
        "accuracy_by_chance": sum(1 / len(q.choices) for q in questions) / count,
    }


def measure_answers(
    model: SimpleGPT, examples: Sequence[Example], batch_size: int = 8
) -> dict[str, Any]:
    """Measures `answer_loss`, and counts the conversations that outgrow the block_size (`cut`)."""
    found = answer_loss(model, examples, batch_size)
    return {
        "conversations": len(examples),
        "cut": sum(len(example.ids) > model.config.block_size + 1 for example in examples),
        "answer_tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
    }
