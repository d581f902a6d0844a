import pytest
from helpers.tokenizers import byte_level, sentencepiece_like
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.token_text import TextStream

TOKENIZERS = {
    "byte-level": PretrainedTokenizer(byte_level()),
    "sentencepiece": PretrainedTokenizer(sentencepiece_like()),
    "tiktoken": BPETokenizer.train("any text " * 9, 262),
}


def pieces(tokenizer, ids, before=()):
    stream = TextStream(tokenizer, before)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_pieces_join_to_the_text_and_none_holds_part_of_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("kind", ["byte-level", "tiktoken"])
@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_join_to_what_decoding_all_gives(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = [i for byte in data for i in _id_of_byte(tokenizer, byte)]
    assert "".join(pieces(tokenizer, ids)) == data.decode(errors="replace")


def _id_of_byte(tokenizer, byte):
    from nanogpt_surgery.data.tokenizers.token_text import CHARACTER_OF_BYTE

    vocab = tokenizer.to_json()["model"]["vocab"]
    return [vocab[CHARACTER_OF_BYTE[byte]]]


def test_a_character_appears_with_the_last_of_its_tokens():
    tokenizer = TOKENIZERS["tiktoken"]
    ids = tokenizer.encode("€")
    assert len(ids) == 3
    assert pieces(tokenizer, ids) == ["", "", "€", ""]
    assert pieces(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_a_space_between_words_survives_at_the_border_with_the_prompt():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("quick brown")
    cut = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]) == "quick")
    assert "".join(pieces(tokenizer, ids[cut:], before=ids[:cut])) == " brown"


def test_tokens_that_all_reach_over_characters():
    tokenizer = BPETokenizer.train("日本語" * 40, 262)
    text = "日本語" * 30 + "日"
    ids = tokenizer.encode(text)
    assert not any(tokenizer.decode([i]).isalpha() for i in ids[:-3])
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_characters_stream_one_by_one():
    tokenizer = CharacterTokenizer("日本 ab")
    assert pieces(tokenizer, tokenizer.encode("a日 b")) == ["a", "日", " ", "b", ""]
