"""Speculative decoding: a draft guesses the next ids, and one pass of the model verifies several.

The pass gives the logits after each drafted id. From them ids are drawn as `generate` draws them,
one after another and by the same random numbers. As long as the draft has guessed what is drawn,
the pass has given one more id; at the first that differs, the rest of the draft is forgotten.

A drafted id x is thus accepted with the probability p(x) that the model gives it, and where it is
not, the id is drawn from the others in proportion to p: the rejection rule of speculative sampling
(arXiv:2211.17192) for a draft that is certain of its guess. So the distribution is the model's, and
more than that: by one seed the text is that of `generate`, whatever the draft. (Where PyTorch
computes it, up to rounding: its sums depend on how many tokens a pass has. The compiled decoder's
do not.) A model that drafts draws by the random numbers that will verify it, which makes
it guess right more often than by its own.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.batch import Token, token_of
from nanogpt_surgery.generation.checks import check_request
from nanogpt_surgery.generation.generate import (
    choose,
    generate,
    last_logits,
    n_shared,
    new_cache,
    next_logits,
)
from nanogpt_surgery.generation.settings import Engine, SamplingSettings
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.values import SIZE, raise_all, wrong_values

if TYPE_CHECKING:
    from nanogpt_surgery.generation.native.decoder import NativeSteps


@dataclass
class Draft(ABC):
    """A way to guess the next ids of a text; it counts how often it was right."""

    num_tokens: int = 10
    """how many ids are drafted for one pass, at most"""
    drafted: int = field(default=0, init=False)
    """ids that were drafted so far"""
    accepted: int = field(default=0, init=False)
    """how many of them were drawn"""

    def __post_init__(self) -> None:
        raise_all(wrong_values(SIZE, {"num_tokens": self.num_tokens}))

    @property
    def accepted_share(self) -> float:
        """The share of drafted ids that were accepted; 0 where none was drafted."""
        return self.accepted / max(1, self.drafted)

    @abstractmethod
    def propose(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        settings: SamplingSettings,
        generator: torch.Generator,
    ) -> list[int]:
        """Returns guesses of the next ids, the first the very next, as many as it likes.

        Args:
            prompt: of the text.
            answer: what was drawn so far.
            settings: by which ids will be drawn.
            generator: a copy of the one by which they will be drawn.
        """


@check_arguments
@dataclass
class PromptLookup(Draft):
    """Guesses what followed the last ids where they stood before in the text.

    Good for answers that repeat their prompt: summaries, corrections, code.
    """

    max_ngram: int = 3
    """how many of the last ids are looked for; where they are not found, fewer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        raise_all(wrong_values(SIZE, {"max_ngram": self.max_ngram}))

    def propose(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        settings: SamplingSettings,
        generator: torch.Generator,
    ) -> list[int]:
        """Returns the ids after the latest earlier occurrence of the last ones; see `Draft`."""
        ids = [*prompt, *answer]
        for n in range(min(self.max_ngram, len(ids) - 1), 0, -1):
            last = ids[-n:]
            for start in range(len(ids) - n - 1, -1, -1):
                if ids[start] == last[0] and ids[start : start + n] == last:
                    return ids[start + n : start + n + self.num_tokens]
        return []


@check_arguments
@dataclass
class DraftModel(Draft):
    """Guesses what a smaller model with the same tokenizer draws."""

    num_tokens: int = 5
    model: SimpleGPT = field(kw_only=True)
    engine: Engine = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache = new_cache(self.model, 1, self.model.config.block_size)
        self.native = _native_steps(self.model, self.cache, self.engine)

    def propose(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        settings: SamplingSettings,
        generator: torch.Generator,
    ) -> list[int]:
        """Returns ids that the smaller model draws, within its block_size; see `Draft`."""
        ids = [*prompt, *answer]
        self.cache.truncate(n_shared(self.cache, ids))
        while len(ids) - len(prompt) - len(answer) < self.num_tokens:
            if len(ids) > self.model.config.block_size:
                break
            logits = next_logits(self.model, ids, self.cache, self.native).cpu()
            ids.append(choose(logits, settings, prompt, ids[len(prompt) :], generator))
        return ids[len(prompt) + len(answer) :]


@check_arguments
def generate_speculative(
    model: SimpleGPT,
    ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    draft: Draft,
    *,
    sampling: SamplingSettings | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    cache: KVCache | None = None,
    engine: Engine = "auto",
) -> Iterator[int]:
    """Continues a prompt as `generate` does, in fewer passes where the draft guesses well.

    The draft is `PromptLookup()` or `DraftModel(model=…)`; the other arguments are `generate`'s.

    Raises:
        SurgeryError: as `generate`, or the draft's model has another vocabulary.
        NotFiniteError: while ids are taken, a logit is no finite number.
    """
    found = _with_logits(model, ids, max_new_tokens, draft, sampling, stop_ids, seed, cache, engine)
    return (new for new, _ in found)


def speculative_tokens(
    model: SimpleGPT,
    ids: Sequence[int],
    max_new_tokens: int,
    draft: Draft,
    *,
    sampling: SamplingSettings | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    likeliest: int = 0,
    until: Callable[[Token], bool] | None = None,
    engine: Engine = "auto",
) -> Iterator[Token]:
    """Continues a prompt as `generate_speculative` does, with the log-probabilities of its tokens.

    The arguments are those of `generate_batch`, for one prompt.
    """
    found = _with_logits(model, ids, max_new_tokens, draft, sampling, stop_ids, seed, None, engine)
    for new, logits in found:
        token = token_of(logits, new, likeliest)
        yield token
        if until is not None and until(token):
            return


def _with_logits(
    model: SimpleGPT,
    ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    draft: Draft,
    sampling: SamplingSettings | None,
    stop_ids: Collection[int],
    seed: int | None,
    cache: KVCache | None,
    engine: Engine,
) -> Iterator[tuple[int, Tensor]]:
    """Checks what was asked for; yields ids, each with the logits (V,) that it is drawn by."""
    settings = sampling or SamplingSettings()
    (prompt,) = check_request(model, [ids], max_new_tokens, settings, seed)
    room = min(model.config.block_size, len(prompt) + max_new_tokens)
    cache = cache or new_cache(model, 1, room)
    if cache.max_length < room:
        raise SurgeryError(f"the cache has room for {cache.max_length} tokens of the text's {room}")
    if isinstance(draft, DraftModel):
        own, theirs = model.config.vocab_size, draft.model.config.vocab_size
        if own != theirs:
            raise SurgeryError(
                f"the draft's model has a vocabulary of {theirs:,}, the model one of {own:,}",
                "a draft takes a model with the same tokenizer",
            )
    native = _native_steps(model, cache, engine)
    return _speculate(model, prompt, max_new_tokens, draft, settings, stop_ids, seed, cache, native)


def generator_with(draft: Draft | None) -> Callable[..., Iterator[int]]:
    """Returns `generate`, or `generate_speculative` with a draft."""
    return generate if draft is None else partial(generate_speculative, draft=draft)


def _native_steps(model: SimpleGPT, cache: KVCache, engine: Engine) -> NativeSteps | None:
    if engine == "native" or (engine == "auto" and cache.ids.is_cpu):
        from nanogpt_surgery.generation.native.decoder import NativeSteps

        return NativeSteps(model, cache, required=engine == "native")
    return None


def _speculate(
    model: SimpleGPT,
    prompt: list[int],
    max_new_tokens: int,
    draft: Draft,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    seed: int | None,
    cache: KVCache,
    native: NativeSteps | None,
) -> Iterator[tuple[int, Tensor]]:
    generator, ahead = torch.Generator(), torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    cache.truncate(n_shared(cache, prompt))
    so_far, answer = list(prompt), list[int]()
    while len(answer) < max_new_tokens:
        most = min(max_new_tokens - len(answer) - 1, cache.max_length - len(so_far))
        guesses = list[int]()
        if most > 0 and answer:  # the prompt itself is computed as `generate` computes it
            ahead.set_state(generator.get_state())
            guesses = draft.propose(prompt, answer, settings, ahead)[:most]
        draft.drafted += len(guesses)
        for place, logits in enumerate(_after_each(model, so_far, guesses, cache, native)):
            check_finite(logits, model, lambda: last_logits(model, cache.ids.new_tensor(so_far)))
            logits = logits.cpu()
            new = choose(logits, settings, prompt, answer, generator)
            if new in stop_ids:
                return
            is_guessed = guesses[place : place + 1] == [new]
            draft.accepted += is_guessed
            yield new, logits
            so_far.append(new)
            answer.append(new)
            if not is_guessed:
                break
        cache.truncate(min(cache.length, len(so_far) - 1))  # without what was guessed in vain


def _after_each(
    model: SimpleGPT,
    so_far: list[int],
    guesses: list[int],
    cache: KVCache,
    native: NativeSteps | None,
) -> Tensor:
    """Returns the logits (1 + guesses, V) after a text, and after each guess that follows it."""
    if not guesses:
        return next_logits(model, so_far, cache, native)[None]
    ids = torch.tensor([so_far[cache.length :] + guesses], device=cache.ids.device)  # (1, T)
    if native is not None and native.can_step():
        return native.logits(ids, 1 + len(guesses))[0]
    with eval_mode(model), torch.inference_mode():
        hidden = model.hidden(ids, cache)[0, -1 - len(guesses) :]
        return model.lm_head(hidden)
