"""A conversation with a model: what was said, what still fits its context, and the next answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from nanogpt_surgery.data.conversations.chat import (
    ChatTemplate,
    Message,
    chat_ids,
    template_of,
)
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, stop_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.cache_memory import check_rows_fit
from nanogpt_surgery.generation.generate import generate, new_cache
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.generation.text import TextUntil, stream_until
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import KVCache


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
        self._full = 0  # ids of the text, were all of them used
        self._answer: TextUntil | None = None  # the last one

    @property
    def cut_off(self) -> bool:
        """Whether the last answer ended because it had no more room, not because it was over."""
        stopped = self._answer is not None and self._answer.found
        return 0 < self._full == len(self.ids) and not stopped

    def ask(
        self,
        text: str,
        max_new_tokens: int,
        sampling: SamplingSettings | None = None,
        *,
        stop: tuple[str, ...] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """Say something; the pieces of the answer, which is remembered as far as it was taken.

        Args:
            text: what is said.
            max_new_tokens: of the answer, at most; it also ends where the context is full.
            sampling: how tokens are chosen.
            stop: strings that end the answer, beside the template's own.
            seed: of the draw.

        Raises:
            SurgeryError: the text is too long for the context, or the template refuses it; or,
                while pieces are taken, the model's logits are not finite. Nothing was said then.
        """
        before, said = self.messages, [*self.messages, {"role": "user", "content": text}]
        room = min(max_new_tokens, max(1, self.model.config.block_size // 2))
        ids, self.forgotten = self._fitting(said, room)
        answer: Message = {"role": "assistant", "content": ""}
        self.room = min(max_new_tokens, self.model.config.block_size - len(ids))
        self._full = len(ids) + self.room
        check_rows_fit(self.model, 1, self._full)
        new_ids = generate(
            self.model,
            ids,
            self.room,
            sampling=sampling,
            stop_ids=stop_ids(self.tokenizer),
            seed=seed,
            cache=self._cache_for(self._full),
        )
        stop = (*self.template.stop, *stop)
        self._answer = TextUntil(self.tokenizer, stop, ids)
        pieces = stream_until(self._answer, self._taken(ids, new_ids))
        self.messages = [*said, answer]
        return self._remembered(pieces, answer, before)

    def _cache_for(self, length: int) -> KVCache:
        """Returns a cache with room for a text, and with the keys and values of the last one."""
        cache = new_cache(self.model, 1, length)
        if self.cache is not None:
            cache.take_over(self.cache, min(self.cache.length, length))
        self.cache = cache
        return cache

    def _taken(self, prompt: list[int], new_ids: Iterator[int]) -> Iterator[int]:
        """Gives new ids on, and keeps those that were taken."""
        self.ids = text = list(prompt)
        for new in new_ids:
            yield new
            text.append(new)

    def _remembered(
        self, pieces: Iterator[str], answer: Message, before: list[Message]
    ) -> Iterator[str]:
        """The pieces, kept in the answer; where one fails, nothing was said."""
        try:
            for piece in pieces:
                answer["content"] += piece
                yield piece
        except SurgeryError:
            self.messages = before
            self.weights_changed()
            raise

    def _fitting(self, said: list[Message], room: int) -> tuple[list[int], int]:
        """The ids of the newest messages that fit beside an answer, and how many do not.

        The search begins where the last one ended, so a long talk is not written out anew.
        """
        block = self.model.config.block_size
        found: dict[int, list[int]] = {}

        def fits(first: int) -> bool:
            if first not in found:
                found[first] = self._ids(said[first:])
            return len(found[first]) + room <= block

        asked = [i for i, message in enumerate(said) if message["role"] == "user"]
        firsts = [0, *asked[1:]]
        near = bisect_left(firsts, self.forgotten)
        if near and fits(firsts[near - 1]):
            place = bisect_left(firsts, True, hi=near - 1, key=fits)
        else:
            place = bisect_left(firsts, True, lo=near, key=fits)
        if place < len(firsts):
            assert fits(firsts[place])
            return found[firsts[place]], firsts[place]
        ids = found[firsts[-1]]
        raise SurgeryError(
            f"the message has {len(ids):,} tokens with all that belongs to it; the model's "
            f"block_size is {block:,}, of which {room:,} are kept for the answer",
            "say it in fewer words, or ask for a shorter answer: max_new_tokens=8 "
            "(/set max_new_tokens 8)",
        )

    def _ids(self, talk: list[Message]) -> list[int]:
        """The ids of messages, after the system prompt, up to where an answer begins."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return chat_ids(self.tokenizer, [*system, *talk], self.template)

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
