import json

import pytest
from helpers.tokenizers import KINDS, TEXT, byte_level, sentencepiece_like
from transformers import PreTrainedTokenizerFast

from nanogpt_surgery import SurgeryError, Tokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import encode_text, prompt_ids

TEXTS = [TEXT, "", " two  spaces ", "<|im_start|>user\nhi<|im_end|>", "</s>new", "🙃ß\u0000x"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(kind, text, tmp_path):
    contents = KINDS[kind]()
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = PretrainedTokenizer(contents)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.encode_to_numpy(text).tolist() == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert prompt_ids(ours, text) == theirs(text)["input_ids"]
    assert ours.vocab_size == len(theirs)


def test_it_is_a_tokenizer_whose_text_becomes_a_tensor():
    tokenizer = PretrainedTokenizer(byte_level())
    assert isinstance(tokenizer, Tokenizer)
    assert encode_text(tokenizer, TEXT).tolist() == tokenizer.encode(TEXT)


def test_bos_comes_once():
    tokenizer = PretrainedTokenizer(sentencepiece_like())
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    assert prompt_ids(tokenizer, "fox")[0] == 1
    assert prompt_ids(tokenizer, "<s>fox").count(1) == 1


def test_bos_can_be_turned_on_and_off():
    on = PretrainedTokenizer(byte_level(), bos_id=1, add_bos=True)
    off = PretrainedTokenizer(sentencepiece_like(), add_bos=False)
    assert on.encode_prompt("fox") == [1, *on.encode("fox")]
    assert off.encode_prompt("fox") == off.encode("fox")


def test_truncation_and_padding_in_the_file_are_not_applied():
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = PretrainedTokenizer(byte_level() | {"truncation": cut})
    assert len(tokenizer.encode(TEXT)) > 3


def test_a_saved_tokenizer_opens_alike(tmp_path):
    tokenizer = PretrainedTokenizer(sentencepiece_like())
    tokenizer.save(tmp_path / "tokenizer.json")
    again = PretrainedTokenizer(json.loads((tmp_path / "tokenizer.json").read_text()))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_ids_that_no_token_has_have_no_text_and_negative_ones_are_refused():
    tokenizer = PretrainedTokenizer(byte_level())
    assert tokenizer.decode([10**6]) == ""
    with pytest.raises(SurgeryError, match="id -1 "):
        tokenizer.decode([3, -1])


@pytest.mark.parametrize("contents", [{}, {"model": {"type": "Magic"}}, {"model": 3}])
def test_what_is_no_tokenizer_is_refused(contents):
    with pytest.raises(SurgeryError, match=r"tokenizer\.json"):
        PretrainedTokenizer(contents)


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(SurgeryError, match=r"U\+D800\) at position 2"):
        PretrainedTokenizer(byte_level()).encode("ab\ud800")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_megabyte_of_one_character_is_encoded(kind):
    tokenizer = PretrainedTokenizer(KINDS[kind]())
    text = "a" * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
