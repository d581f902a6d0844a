"""Generation: a generator of ids, one forward pass of one token each."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
from nanogpt_surgery.generation.sampling import choose
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def generate(
    model: SimpleGPT,
    ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    sampling: SamplingSettings | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    past: Past | None = None,
) -> Iterator[int]:
    """Continue a prompt, an id for each item taken from the iterator.

    Keys and values of the past are kept, so each token costs one pass of one token. Past
    `block_size` the window slides: each new token is computed from the last `block_size` ids anew,
    and a `SurgeryWarning` says so once.

    Args:
        model: left in the mode it is in; computed in eval mode.
        ids: the prompt, at least one id: a sequence, or a tensor (T,) or (1, T).
        max_new_tokens: how many at most.
        temperature: 0 takes the likeliest id; 1 draws from the model's distribution.
        top_k: draw among the k likeliest alone.
        sampling: every setting of the draw, in the place of temperature and top_k.
        stop_ids: ids after which to stop; the one met is not yielded.
        seed: of the draw; None draws differently each time.
        past: keys and values of the last call that was given it; where the prompt begins as that
            text did, they are not computed again. Only for the same weights.

    Raises:
        SurgeryError: an empty prompt, an id outside the vocabulary, or a setting outside its range.
    """
    prompt = torch.as_tensor(ids, dtype=torch.long)
    check_prompt(model, prompt)
    check_count(max_new_tokens)
    settings = sampling or SamplingSettings(temperature, top_k)
    check_bias(model, settings)
    return _ids(model, prompt.flatten(), max_new_tokens, settings, stop_ids, seed, past or Past())


def check_prompt(model: SimpleGPT, prompt: Tensor) -> None:
    """Raise `SurgeryError` unless a prompt (T,) has ids, and all of the vocabulary."""
    vocab_size = model.config.vocab_size
    if prompt.dim() != 1 and prompt.shape[:-1] != (1,):
        raise SurgeryError(
            f"the prompt has the shape {tuple(prompt.shape)}; it must be one row of ids",
            "call generate for each prompt",
        )
    if prompt.numel() == 0:
        raise SurgeryError("the prompt is empty; generation starts from at least one token")
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
        raise SurgeryError(
            f"the prompt has ids from {int(prompt.min())} to {int(prompt.max())}; the model's "
            f"vocabulary is 0 to {vocab_size - 1}"
        )


def check_count(max_new_tokens: int) -> None:
    """Raise `SurgeryError` if a number of tokens to generate is negative."""
    if max_new_tokens < 0:
        raise SurgeryError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")


def check_bias(model: SimpleGPT, settings: SamplingSettings) -> None:
    """Raise `SurgeryError` if a bias is on an id outside the vocabulary."""
    vocab_size = model.config.vocab_size
    outside = [index for index in settings.logit_bias if not 0 <= index < vocab_size]
    if outside:
        raise SurgeryError(
            f"logit_bias names the id {outside[0]}; the model's vocabulary is 0 to {vocab_size - 1}"
        )


def last_logits(model: SimpleGPT, ids: Tensor) -> Tensor:
    """Logits (V,) after ids (T,), computed anew without a cache."""
    logits: Tensor = model.lm_head(model.hidden(ids[None])[0, -1])
    return logits


class Past:
    """What a call of `generate` leaves behind for the next one."""

    def __init__(self) -> None:
        self.window: Window | None = None

    def follow(self, window: Window) -> None:
        """Give a new window what it has in common with the last one, and remember it."""
        if self.window is not None:
            window.take_over(self.window)
        self.window = window


def _ids(
    model: SimpleGPT,
    prompt: Tensor,
    max_new_tokens: int,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    seed: int | None,
    past: Past,
) -> Iterator[int]:
    draw = torch.Generator()
    draw.seed() if seed is None else draw.manual_seed(seed)
    before, answer = prompt.tolist(), list[int]()
    window = Window(model, prompt, max_new_tokens)
    past.follow(window)
    for _ in range(max_new_tokens):
        new = choose(window.next_logits().cpu(), settings, before, answer, draw)
        if new in stop_ids:
            return
        yield new
        answer.append(new)
        window.append(new)


class Window:
    """The last `block_size` ids, and the cache of all but those not yet computed."""

    def __init__(self, model: SimpleGPT, prompt: Tensor, max_new_tokens: int):
        weight = next(model.parameters())  # the embedding, which surgery may have wrapped
        self.model = model
        self.ids = prompt.to(weight.device)
        self.block_size = model.config.block_size
        room = min(self.block_size, len(prompt) + max_new_tokens)
        self.cache = KVCache(model.config, 1, room, weight.dtype, weight.device)
        self.warned = False

    def take_over(self, other: Window) -> None:
        """Copy the keys and values of the ids that both texts begin with, all but the last id."""
        most = min(len(self.ids) - 1, other.cache.length, self.cache.max_length)
        equal = self.ids[:most] == other.ids[:most]
        count = int(equal.long().cumprod(0).sum())
        self.cache.take_over(other.cache, count)

    def append(self, new: int) -> None:
        """Add an id to the text."""
        self.ids = torch.cat((self.ids, self.ids.new_tensor([new])))

    def next_logits(self) -> Tensor:
        """Logits (V,) of the token after the ids.

        Raises:
            NotFiniteError: one of them is no finite number.
        """
        if len(self.ids) > self.block_size:
            self._slide()
        new = self.ids[None, self.cache.length :]
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                hidden = self.model.hidden(new, self.cache)  # (1, T, C)
                logits: Tensor = self.model.lm_head(hidden[0, -1])  # (V,)
        finally:
            self.model.train(training)
        check_finite(logits, self.model, lambda: last_logits(self.model, self.ids))
        return logits

    def _slide(self) -> None:
        if not self.warned:
            warnings.warn(
                f"the text has outgrown the model's block_size of {self.block_size} tokens: the "
                "window slides, and the oldest are forgotten",
                SurgeryWarning,
                stacklevel=4,
            )
            self.warned = True
        self.ids = self.ids[-self.block_size :]
        self.cache.truncate(0)
