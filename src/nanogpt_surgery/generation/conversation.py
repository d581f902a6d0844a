"""A conversation with a model: what was said, what still fits its context, and the next answer."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterator

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.conversations.chat import (
    ChatTemplate,
    Message,
    chat_ids,
    template_of,
)
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, stop_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.checks import check_rows_fit
from nanogpt_surgery.generation.generate import new_cache
from nanogpt_surgery.generation.settings import Engine, SamplingSettings
from nanogpt_surgery.generation.speculative import Draft, generator_with
from nanogpt_surgery.generation.text import TextUntil
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.simple_gpt import SimpleGPT


class Conversation:
    """Messages, and a model that answers them.

    All that was said is kept. What no longer fits the model's block_size beside the room for an
    answer is left out of the prompt, the oldest exchanges first and never the system prompt;
    `forgotten` says how many messages that is.

    Args:
        model: answers; in eval mode whatever mode it is in.
        tokenizer: the model's.
        template: how messages are written; the tokenizer's own by default.
    """

    @check_arguments
    def __init__(
        self, model: SimpleGPT, tokenizer: Tokenizer, template: ChatTemplate | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.template = template or template_of(tokenizer)
        self.system = ""
        self.messages: list[Message] = []
        self.forgotten = 0
        self.ids: list[int] = []  # of the last prompt, and of its answer as far as it was taken
        self.cache: KVCache | None = None  # of the text that these are
        self.room = 0  # tokens that the last answer could have
        self.cut_off = False  # whether it ended for want of room, and not because it was over

    def ask(
        self,
        text: str,
        max_new_tokens: int,
        sampling: SamplingSettings | None = None,
        *,
        stop: tuple[str, ...] = (),
        seed: int | None = None,
        engine: Engine = "auto",
        draft: Draft | None = None,
    ) -> Iterator[str]:
        """Say something; the pieces of the answer, which is remembered as far as it was taken.

        Args:
            text: what is said.
            max_new_tokens: of the answer, at most; it also ends where the context is full.
            sampling: how tokens are chosen.
            stop: strings that end the answer, beside the template's own.
            seed: of the draw.
            engine: who computes the answer; see `generate`.
            draft: guesses tokens, so that one pass verifies several; see `generate_speculative`.

        Raises:
            SurgeryError: the text is too long for the context, or the template refuses it; or,
                while pieces are taken, the model's logits are not finite. Nothing was said then.
        """
        block, before = self.model.config.block_size, self.messages
        said: list[Message] = [*before, {"role": "user", "content": text}]
        self.ids, self.forgotten = self._fitting(said, min(max_new_tokens, max(1, block // 2)))
        self.room, self.cut_off = min(max_new_tokens, block - len(self.ids)), False
        check_rows_fit(self.model, 1, len(self.ids) + self.room)  # before the cache is made
        until = TextUntil(self.tokenizer, (*self.template.stop, *stop), self.ids)
        new_ids = generator_with(draft)(
            self.model,
            self.ids,
            self.room,
            sampling=sampling,
            stop_ids=stop_ids(self.tokenizer),
            seed=seed,
            cache=self._cache_for(len(self.ids) + self.room),
            engine=engine,
        )
        answer: Message = {"role": "assistant", "content": ""}
        self.messages = [*said, answer]
        return self._remembered(self.ids, new_ids, until, answer, before)

    def _cache_for(self, length: int) -> KVCache:
        """Returns a cache with room for a text, and with the keys and values of the last one."""
        cache = new_cache(self.model, 1, length)
        if self.cache is not None:
            count = min(self.cache.length, length)
            cache.append_ids(self.cache.ids[:, :count])
            for layer, old in zip(cache.layers, self.cache.layers, strict=True):
                layer.append(old.keys[:, :, :count], old.values[:, :, :count])
        self.cache = cache
        return cache

    def _remembered(
        self,
        ids: list[int],
        new_ids: Iterator[int],
        until: TextUntil,
        answer: Message,
        before: list[Message],
    ) -> Iterator[str]:
        """The pieces of an answer, kept in it and in ids; where one fails, nothing was said."""
        full = len(ids) + self.room

        def taken() -> Iterator[int]:
            for new in new_ids:
                yield new
                ids.append(new)

        try:
            for piece in until.stream(taken()):
                answer["content"] += piece
                yield piece
            self.cut_off = len(ids) == full and not until.found
        except SurgeryError:
            self.messages = before
            self.weights_changed()
            raise

    def _fitting(self, said: list[Message], room: int) -> tuple[list[int], int]:
        """The ids of the newest messages that fit beside an answer, and how many do not.

        The search begins where the last one ended, so a long talk is not written out anew.
        """
        block = self.model.config.block_size
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []

        @functools.cache
        def ids_from(first: int) -> list[int]:
            return chat_ids(self.tokenizer, [*system, *said[first:]], self.template)

        def fits(first: int) -> bool:
            return len(ids_from(first)) + room <= block

        asked = [i for i, message in enumerate(said) if message["role"] == "user"]
        firsts = [0, *asked[1:]]
        near = bisect_left(firsts, self.forgotten)
        if near and fits(firsts[near - 1]):
            place = bisect_left(firsts, True, hi=near - 1, key=fits)
        else:
            place = bisect_left(firsts, True, lo=near, key=fits)
        if place < len(firsts):
            return ids_from(firsts[place]), firsts[place]
        raise SurgeryError(
            f"the message has {len(ids_from(firsts[-1])):,} tokens with all that belongs to it; "
            f"the model's block_size is {block:,}, of which {room:,} are kept for the answer",
            "say it in fewer words, or ask for a shorter answer: max_new_tokens=8 "
            "(/set max_new_tokens 8)",
        )

    def undo(self) -> str:
        """Take the last exchange back; what the user had said in it.

        Raises:
            SurgeryError: nothing has been said.
        """
        if not self.messages:
            raise SurgeryError("nothing has been said that could be taken back")
        last = max(i for i, m in enumerate(self.messages) if m["role"] == "user")
        said: str = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return said

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages, self.forgotten = [], 0

    def weights_changed(self) -> None:
        """Keys and values of before are of no use: call it after any change of the model."""
        self.cache = None
