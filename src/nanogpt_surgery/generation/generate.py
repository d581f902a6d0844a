"""Generation: a generator of ids, one forward pass of one token each.

Legend: T new tokens, C width, V vocabulary, K ids to draw from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, warn
from nanogpt_surgery.generation.checks import check_request
from nanogpt_surgery.generation.settings import Engine, SamplingSettings
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT

if TYPE_CHECKING:
    from nanogpt_surgery.generation.native.decoder import NativeSteps


@check_arguments
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
    cache: KVCache | None = None,
    engine: Engine = "auto",
) -> Iterator[int]:
    """Continues a prompt, an id for each item taken from the iterator.

    Keys and values of the tokens so far are kept, so each token costs one pass of one token. Past
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
        cache: keys and values of an earlier text, from the same weights; where the prompt begins as
            that text does, they are not computed again. Those of this text lie in it afterwards.
        engine: what computes the tokens: the model in Python (plain), a compiled decoder that gives
            the same to rounding (native, but for long prompts), or the decoder where it can (auto).

    Raises:
        SurgeryError: an empty prompt, an id outside the vocabulary, a setting outside its range, a
            cache with too little room, or a model that the native engine does not compute.
        NotFiniteError: while ids are taken, a logit is no finite number.
    """
    settings = sampling or SamplingSettings(temperature, top_k)
    (prompt,) = check_request(model, [ids], max_new_tokens, settings, seed)
    room = min(model.config.block_size, len(prompt) + max_new_tokens)
    cache = cache or new_cache(model, 1, room)
    if cache.max_length < room:
        raise SurgeryError(f"the cache has room for {cache.max_length} tokens of the text's {room}")
    native = None
    if engine == "native" or (engine == "auto" and cache.ids.is_cpu):
        from nanogpt_surgery.generation.native.decoder import NativeSteps

        native = NativeSteps(model, cache, required=engine == "native")
    return _generate(model, prompt, max_new_tokens, settings, stop_ids, seed, cache, native)


def _generate(
    model: SimpleGPT,
    prompt: list[int],
    max_new_tokens: int,
    settings: SamplingSettings,
    stop_ids: Collection[int],
    seed: int | None,
    cache: KVCache,
    native: NativeSteps | None,
) -> Iterator[int]:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    # What the cache holds beyond the prompt's own beginning belongs to another text.
    cache.truncate(n_shared(cache, prompt))
    so_far, answer = list(prompt), list[int]()
    for _ in range(max_new_tokens):
        logits = next_logits(model, so_far, cache, native).cpu()  # (V,)
        new = choose(logits, settings, prompt, answer, generator)
        if new in stop_ids:
            return
        yield new
        so_far.append(new)
        answer.append(new)


def next_logits(
    model: SimpleGPT, so_far: list[int], cache: KVCache, native: NativeSteps | None = None
) -> Tensor:
    """Returns the logits (V,) of the id after these, and adds the new ones to the cache.

    Raises:
        NotFiniteError: one of them is no finite number.
    """
    block_size = model.config.block_size
    if len(so_far) > block_size:
        # The first time: the prompt alone is longer, or the text has just become so.
        if cache.length < block_size or len(so_far) == block_size + 1:
            _warn_of_sliding(block_size)
        # Each id is at another position than before, so all keys and values are computed anew.
        cache.truncate(0)
        so_far = so_far[-block_size:]
    device = cache.ids.device
    new = torch.tensor([so_far[cache.length :]], device=device)  # (1, T)
    if native is not None and native.can_take(new.size(1)):
        logits = native.step(new)[0]  # (V,): the same, faster
    else:
        with eval_mode(model), torch.inference_mode():
            hidden = model.hidden(new, cache)  # (1, T, C)
            logits = model.lm_head(hidden[0, -1])  # (V,)
    # If one is not finite, the pass is repeated to find the module where that began.
    check_finite(logits, model, lambda: last_logits(model, torch.tensor(so_far, device=device)))
    return logits


def last_logits(model: SimpleGPT, ids: Tensor) -> Tensor:
    """Returns the logits (V,) after ids (T,), computed without a cache."""
    return model.lm_head(model.hidden(ids[None])[0, -1])


def new_cache(model: SimpleGPT, rows: int, length: int) -> KVCache:
    """Returns an empty cache with the dtype and the device of a model's weights."""
    weight = next(model.parameters())  # the embedding, which surgery may have wrapped
    return KVCache(model.config, rows, length, weight.dtype, weight.device)


def n_shared(cache: KVCache, prompt: list[int]) -> int:
    """Returns how many ids a cache and a prompt begin with alike.

    The prompt's last one is left out: it is computed in any case, since its logits are wanted.
    """
    cached = cache.ids[0, : min(cache.length, len(prompt) - 1)].tolist()
    differing = (
        i for i, (one, other) in enumerate(zip(cached, prompt, strict=False)) if one != other
    )
    return next(differing, len(cached))


def _warn_of_sliding(block_size: int) -> None:
    warn(
        f"the text has outgrown the model's block_size of {block_size} tokens: the window slides, "
        "and the oldest are forgotten"
    )


def choose(
    logits: Tensor,
    settings: SamplingSettings,
    prompt: Sequence[int],
    answer: Sequence[int],
    generator: torch.Generator | None = None,
) -> int:
    """Draws one id from logits (V,), given the ids of the prompt and of the answer so far."""
    logits = penalised(logits, settings, prompt, answer)
    if settings.logit_bias and float(logits.max()) == -math.inf:
        raise SurgeryError("logit_bias bans every id", "leave one that can be drawn")
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = logits.float()
    # Relative to the largest, so that no temperature, however small, makes infinities.
    temperature = max(settings.temperature, torch.finfo(logits.dtype).tiny)
    logits, ids = candidates((logits - logits.max()) / temperature, settings)
    return int(ids[torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)])


def penalised(
    logits: Tensor, settings: SamplingSettings, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Returns logits (V,) after penalties and biases; the argument is left as it is."""
    if not settings.penalises and not settings.logit_bias:
        return logits
    logits = logits.float().clone()
    seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.long)
    values = logits[seen]
    penalty = settings.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=logits.numel())
    logits -= settings.frequency_penalty * counts + settings.presence_penalty * (counts > 0)
    for index, bias in settings.logit_bias.items():
        logits[index] += bias
    return logits


def candidates(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Returns the logits among which to draw, and their ids, both (K,)."""
    ids = torch.arange(logits.numel(), device=logits.device)
    if settings.top_k is not None and settings.top_k < logits.numel():
        logits, ids = logits.topk(settings.top_k)
    if settings.top_p < 1:
        logits, order = logits.sort(descending=True)
        ids = ids[order]
        probabilities = torch.softmax(logits, -1)
        before = probabilities.cumsum(-1) - probabilities  # of all that are likelier
        count = int((before < settings.top_p).sum())
        logits, ids = logits[:count], ids[:count]
    if settings.min_p > 0:
        probabilities = torch.softmax(logits, -1)
        likely = probabilities >= settings.min_p * probabilities.max()
        logits, ids = logits[likely], ids[likely]
    return logits, ids
