import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

from nanogpt_surgery import SurgeryError, Tokenizer, python_reference
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    is_ours,
)
from nanogpt_surgery.data.tokenizers.token_text import CHARACTER_OF_BYTE, read_bytes
from nanogpt_surgery.data.tokenizers.tokenizer import encode_text, stop_ids

TEXT = python_reference()[:60_000] + "naïve 日本語 😀\n\n\n   x = 0x1F"
TOKENIZER = BPETokenizer.train(TEXT, 700)
REFERENCE = Encoder.from_str(json.dumps(TOKENIZER.to_json()))
SAMPLES = st.one_of(st.text(max_size=60), st.text(alphabet="the ,.in'sl\n 12", max_size=80))


def test_the_byte_alphabet_is_a_bijection():
    assert len(set(CHARACTER_OF_BYTE.values())) == 256
    assert [read_bytes(CHARACTER_OF_BYTE[byte]) for byte in range(256)] == [
        bytes([b]) for b in range(256)
    ]
    assert read_bytes("ĠĊ") == b" \n"


@given(SAMPLES | st.text(alphabet="I'sdmtlvreT \n", max_size=12))
def test_words_are_cut_as_gpt2_cuts_them(text):
    ours = REFERENCE.pre_tokenizer.pre_tokenize_str(text)
    assert ours == ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


@given(SAMPLES)
def test_text_comes_back_and_the_file_encodes_alike_elsewhere(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert ids == REFERENCE.encode(text, add_special_tokens=False).ids
    assert REFERENCE.decode(ids, skip_special_tokens=False) == text


def test_a_whole_corpus_is_encoded_as_elsewhere_and_shorter():
    assert encode_text(TOKENIZER, TEXT).tolist() == REFERENCE.encode(TEXT).ids
    assert len(TOKENIZER.encode(TEXT)) < 0.5 * len(TEXT.encode())


def test_the_vocabulary_has_the_size_asked_for_and_ends_with_the_special_token():
    assert isinstance(TOKENIZER, Tokenizer)
    assert TOKENIZER.vocab_size == 700
    assert TOKENIZER.encode(END_OF_TEXT) == [699]
    assert stop_ids(TOKENIZER) == {699}
    assert TOKENIZER.token_of(699) == END_OF_TEXT


def test_training_is_reproducible():
    assert BPETokenizer.train(TEXT, 400).to_json() == BPETokenizer.train([TEXT], 400).to_json()


def test_it_opens_as_it_was_saved(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    assert is_ours(contents)
    assert BPETokenizer.from_json(contents).encode(TEXT) == TOKENIZER.encode(TEXT)


def test_gpt2s_two_files_are_read_as_transformers_reads_them(tmp_path):
    vocab = TOKENIZER.vocab | TOKENIZER.special
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in TOKENIZER.merges]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours = BPETokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    theirs = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert ours.encode(f"a{END_OF_TEXT}b") == theirs(f"a{END_OF_TEXT}b")["input_ids"]


def test_a_megabyte_of_one_character_is_encoded():
    assert TOKENIZER.decode(TOKENIZER.encode("a" * 1_000_000)) == "a" * 1_000_000


def test_contradictions_are_named_all_at_once():
    vocab = dict(TOKENIZER.vocab)
    del vocab["a"]
    vocab["日"] = 0
    with pytest.raises(SurgeryError, match=r"'a'.*'日'.*two tokens"):
        BPETokenizer(vocab, [])
    with pytest.raises(SurgeryError, match="another order"):
        BPETokenizer(TOKENIZER.vocab, TOKENIZER.merges[::-1])
    with pytest.raises(SurgeryError, match="q q"):
        BPETokenizer(TOKENIZER.vocab, [("q", "q")])
    with pytest.raises(SurgeryError, match="a b c"):
        BPETokenizer.from_json(TOKENIZER.to_json() | {"model": {"vocab": {}, "merges": ["a b c"]}})


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(SurgeryError, match=r"\b100\b.*\b257\b"):
        BPETokenizer.train("text", 100)
    with pytest.raises(SurgeryError, match=r"\b700\b"):
        TOKENIZER.decode([700])
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path / "no"))):
        BPETokenizer.from_files(tmp_path / "no", tmp_path / "no")
