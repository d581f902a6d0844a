"""The ids of conversations, and which are trained on, equal those of transformers."""

import json
import re

import pytest
from helpers.tokenizers import byte_level, sentencepiece_like, unigram
from transformers import PreTrainedTokenizerFast

from nanogpt_surgery import BPETokenizer, CharacterTokenizer, SurgeryError
from nanogpt_surgery.data.conversations.chat import ChatTemplate, chat_ids, template_of
from nanogpt_surgery.data.conversations.instruction_dataset import preview, preview_tokens
from nanogpt_surgery.data.conversations.instructions import encode_conversations
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.token_text import encode_with_offsets

# The body of an answer is marked, as some templates do, so that transformers gives a mask too.
TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token + '\n' }}
{%- endgeneration %}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
TALK = [
    {"role": "user", "content": "The quick fox?"},
    {"role": "assistant", "content": "The lazy dog, naïvely 😀"},
    {"role": "user", "content": "  日本語?\n"},
    {"role": "assistant", "content": "the fox's theirs"},
]
TRIMMED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def with_prefix_space():
    found = byte_level()
    found["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    return found


KINDS = {
    "byte-level": byte_level,
    "byte-level, offsets trimmed": lambda: byte_level() | {"post_processor": TRIMMED},
    "byte-level, space first": with_prefix_space,
    "byte-level, NFKC": lambda: byte_level() | {"normalizer": {"type": "NFKC"}},
    "prepend": sentencepiece_like,
    "metaspace": lambda: sentencepiece_like() | {"normalizer": None, "pre_tokenizer": METASPACE},
    "unigram": unigram,
}


def end_of(contents: dict) -> str:
    """The last special token of a vocabulary, as text."""
    return contents["added_tokens"][-1]["content"]


def by_first_characters(expected, tokenizer):
    """Transformers' mask but for tokens over an answer's beginning, which it takes to the answer.

    Whether there is one depends on how ties fell when the small tokenizer was trained.
    """
    text = tokenizer.apply_chat_template(TALK, chat_template=TEMPLATE, tokenize=False)
    begin = [found.end() for found in re.finditer(r"<\|assistant\|>\n", text)]
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert places["input_ids"] == expected["input_ids"]
    assert len(begin) == 2
    return [
        0 if any(first < place < after for place in begin) else trained
        for trained, (first, after) in zip(
            expected["assistant_masks"], places["offset_mapping"], strict=True
        )
    ]


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_what_is_trained_on(kind, bos, tmp_path):
    contents = KINDS[kind]()
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    end = end_of(contents)
    named = {"bos_token": end} if bos else {}
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=end, **named
    )
    id_of = {token["content"]: token["id"] for token in contents["added_tokens"]}
    ours = PretrainedTokenizer(
        contents, bos_id=id_of[end] if bos else None, stop_ids=[id_of[end]], chat_template=TEMPLATE
    )
    template = ChatTemplate(TEMPLATE, end if bos else "", end)
    expected = theirs.apply_chat_template(
        TALK, chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    [example] = encode_conversations([TALK], ours, template)
    assert list(example.ids) == expected["input_ids"]
    trained = by_first_characters(expected, theirs)
    assert list(map(int, example.trained)) == trained
    asked = theirs.apply_chat_template(
        TALK[:3], chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert chat_ids(ours, TALK[:3], template) == asked
    if trained == expected["assistant_masks"]:  # no token over a border
        assert list(example.ids[: len(asked)]) == asked
    for shown in (preview(example, ours), preview_tokens(example, ours)):
        assert "".join(text for text, _ in shown) == theirs.decode(example.ids)
    [every] = encode_conversations([TALK], ours, template, answers_only=False)
    assert every.ids == example.ids


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, offsets trimmed"])
def test_a_token_over_the_border_belongs_to_the_side_of_its_first_character(kind):
    tokenizer = PretrainedTokenizer(KINDS[kind](), stop_ids=[2])
    source = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "fox"}]
    [example] = encode_conversations([talk], tokenizer, ChatTemplate(source))
    last = [(text, trained) for text, trained in preview_tokens(example, tokenizer)][-2:]
    assert last == [(" fo", False), ("x", True)]


class OnlyEncodes:
    """The protocol, and nothing else."""

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode


@pytest.mark.parametrize(
    "tokenizer",
    [
        BPETokenizer.train("The quick brown fox — naïve 日本語 😀 " * 3, 300),
        CharacterTokenizer("The quick brown fox — naïve 日本語 😀\n"),
        OnlyEncodes(PretrainedTokenizer(byte_level())),
    ],
    ids=["bpe", "characters", "a tokenizer that only encodes and decodes"],
)
def test_offsets_are_the_places_of_first_characters(tokenizer):
    text = "brown 😀 — naïve\n日本語 fox"
    if isinstance(tokenizer, CharacterTokenizer):
        text = text.replace("\n", " ")
    ids, offsets = encode_with_offsets(tokenizer, text)
    assert ids == tokenizer.encode(text)
    assert offsets == sorted(offsets)
    for start, first, after in zip(
        range(len(ids)), offsets, [*offsets[1:], len(text)], strict=True
    ):
        part = tokenizer.decode(ids[start : start + 1])
        assert part == text[first:after] or "\ufffd" in part
    assert offsets[0] == 0


def test_a_tokenizer_whose_offsets_are_not_known_is_refused():
    class Lower:
        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text.lower()]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    assert encode_with_offsets(Lower(), "ab") == ([97, 98], [0, 1])
    with pytest.raises(SurgeryError, match="Lower"):
        encode_with_offsets(Lower(), "Ab")


def test_our_plain_template_parts_question_and_answer_between_tokens():
    tokenizer = BPETokenizer.train("User: Assistant:\nThe quick\nbrown fox " * 5, 300)
    talk = [{"role": "user", "content": "The"}, {"role": "assistant", "content": "quick"}]
    template = template_of(tokenizer)
    assert template.source == "plain"
    [example] = encode_conversations([talk], tokenizer, template)
    asked = chat_ids(tokenizer, talk[:1], template)
    assert list(example.ids[: len(asked)]) == asked
    assert list(example.trained) == [False] * len(asked) + [True] * (len(example.ids) - len(asked))
