"""Tokenizers with more tokens, and with fewer: what stays is encoded as before."""

import pytest
from helpers.tokenizers import TEXT, byte_level, sentencepiece_like, unigram
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import BPETokenizer, CharacterTokenizer, SurgeryError
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.resizing import (
    ids_of_tokens,
    with_added_tokens,
    without_unused_tokens,
)

BPE = BPETokenizer.train(TEXT, 320)
CHATML = PretrainedTokenizer(
    byte_level(330), stop_ids=[0], special_tokens={"bos_token": "<|im_start|>"}
)
LLAMA = PretrainedTokenizer(sentencepiece_like(), stop_ids=[2])
UNIGRAM = PretrainedTokenizer(unigram())
CHARACTERS = CharacterTokenizer(TEXT)
ALL = {"bpe": BPE, "chatml": CHATML, "llama": LLAMA, "unigram": UNIGRAM}
WITH_BYTES = ["bpe", "chatml", "llama"]


@pytest.mark.parametrize("name", ALL)
def test_an_added_token_is_one_id_and_the_others_keep_theirs(name):
    tokenizer = ALL[name]
    made = with_added_tokens(tokenizer, ["brown fox", "<tool>"])
    before, after = ids_of_tokens(tokenizer.to_json()), ids_of_tokens(made.to_json())
    assert before.items() <= after.items()
    assert made.vocab_size == tokenizer.vocab_size + 2
    assert made.encode("brown fox") == [tokenizer.vocab_size]
    assert tokenizer.vocab_size + 1 in made.encode("a<tool>b")
    assert made.encode("lazy dogs") == tokenizer.encode("lazy dogs")
    assert made.stop_ids == tokenizer.stop_ids
    assert "brown fox" in made.decode(made.encode("the brown fox jumps"))


def test_a_token_that_the_vocabulary_writes_otherwise_is_not_added_again():
    [index] = CHATML.encode("\n")
    with pytest.raises(SurgeryError, match=rf"already, {index}"):
        with_added_tokens(CHATML, ["\n"])


def test_a_character_is_added():
    CHARACTERS.chat_template = "{{ messages }}"
    made = with_added_tokens(CHARACTERS, ["§"])
    assert made.encode("fox§") == [*CHARACTERS.encode("fox"), CHARACTERS.vocab_size]
    assert made.chat_template == CHARACTERS.chat_template
    with pytest.raises(SurgeryError, match="2 characters"):
        with_added_tokens(CHARACTERS, ["§§"])


@pytest.mark.parametrize("name", ALL)
def test_a_token_that_cannot_be_added_is_named(name):
    there = ids_of_tokens(ALL[name].to_json())
    token = next(iter(there))
    for tokens, said in (
        ([""], "empty"),
        (["xyz", "xyz"], "'xyz'.*twice"),
        ([token], f"as {there[token]}"),
    ):
        with pytest.raises(SurgeryError, match=said):
            with_added_tokens(ALL[name], tokens)


@pytest.mark.parametrize("name", WITH_BYTES)
@given(texts=st.lists(st.text(), min_size=1, max_size=3).filter(any), other=st.text())
def test_what_the_texts_use_is_encoded_as_before(name, texts, other):
    tokenizer = ALL[name]
    made, kept = without_unused_tokens(tokenizer, [*texts, TEXT[:20]])
    assert type(made) is type(tokenizer)
    assert made.vocab_size == len(kept) <= tokenizer.vocab_size
    assert kept == sorted(set(kept))
    for text in texts:
        assert [kept[i] for i in made.encode(text)] == tokenizer.encode(text)
    assert made.decode(made.encode(other)) == tokenizer.decode(tokenizer.encode(other))
    assert {kept[i] for i in made.stop_ids} == tokenizer.stop_ids
    names = {i: token for token, i in ids_of_tokens(made.to_json()).items()}
    before = ids_of_tokens(tokenizer.to_json())
    assert all(before[names[new]] == old for new, old in enumerate(kept))


def test_fewer_tokens_are_left_and_special_ones_stay():
    for name in WITH_BYTES:
        made, kept = without_unused_tokens(ALL[name], "quick")
        assert 256 < len(kept) < ALL[name].vocab_size - 20, name
    assert CHATML.id_of("<|im_end|>") is not None
    made, _ = without_unused_tokens(CHATML, "quick")
    assert made.id_of("<|im_end|>") is not None
    made, kept = without_unused_tokens(LLAMA, "quick")
    assert [kept[i] for i in made.encode_prompt("quick")] == LLAMA.encode_prompt("quick")


def test_an_added_token_that_a_template_writes_stays():
    tokenizer = with_added_tokens(CHATML, ["<think>", "<other>"])
    tokenizer.chat_template = "{{ '<think>' }}"
    made, _ = without_unused_tokens(tokenizer, "quick")
    assert made.id_of("<think>") is not None
    assert made.id_of("<other>") is None


def test_a_vocabulary_without_some_bytes_keeps_those_that_it_has():
    """As SmolLM2's: bytes that its training text did not have are unknown to it."""
    contents = byte_level(330)
    del contents["model"]["vocab"]["Ā"]  # byte 0
    tokenizer = PretrainedTokenizer(contents)
    made, _ = without_unused_tokens(tokenizer, "quick")
    for text in (TEXT, "nul\x00 bell"):
        assert made.decode(made.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_characters_are_dropped():
    made, kept = without_unused_tokens(CHARACTERS, "lazy fox")
    assert [kept[i] for i in made.encode("lazy fox")] == CHARACTERS.encode("lazy fox")
    assert made.vocab_size == len(set("lazy fox"))


def test_where_dropping_would_lose_texts_it_is_refused():
    with pytest.raises(SurgeryError, match="Unigram"):
        without_unused_tokens(UNIGRAM, TEXT)
    contents = sentencepiece_like()
    contents["model"] |= {"byte_fallback": False}
    with pytest.raises(SurgeryError, match="each byte"):
        without_unused_tokens(PretrainedTokenizer(contents), TEXT)
    with pytest.raises(SurgeryError, match="empty"):
        without_unused_tokens(BPE, ["", ""])
