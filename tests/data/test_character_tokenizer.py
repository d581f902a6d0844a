import json

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer, GPTDataset, SurgeryError, Tokenizer

texts = st.text(min_size=1)  # all of Unicode but lone surrogates, which UTF-8 cannot hold
# What a pattern for "one character" tends to miss: line ends of every kind, joiners, marks, planes.
AWKWARD = (
    "a\n\nb\t\tc\r\n\r\nd\u00a0e\u2028f\u2029g\x00h\x0bi\x0cj\x85k\u200dl\ufeffm e\u0301 é 한 각 "
    "\u1100\u1161 👩\u200d👩\u200d👧 🏳️\u200d🌈 \U0010ffff \u0378 <unk> [UNK] ## Ġ ▁"
)


@given(texts)
def test_round_trip(text):
    tokenizer = CharacterTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


@given(texts)
def test_ids_follow_code_points(text):
    tokenizer = CharacterTokenizer(text)
    characters = [tokenizer.id_to_character[i] for i in range(tokenizer.vocab_size)]
    assert characters == sorted(set(text))
    assert all(tokenizer.character_to_id[c] == i for i, c in enumerate(characters))


@given(texts, st.data())
def test_both_ways_to_encode_agree(text, data):
    tokenizer = CharacterTokenizer(text)
    other = data.draw(st.text(st.sampled_from(sorted(set(text)))))
    ids = tokenizer.encode_to_numpy(other)
    assert isinstance(ids, np.ndarray)
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(other)


@given(texts)
def test_saved_and_loaded_it_encodes_alike(text):
    tokenizer = CharacterTokenizer(text)
    again = CharacterTokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.character_to_id == tokenizer.character_to_id
    assert again.encode(text) == tokenizer.encode(text)


def test_save_writes_what_from_json_reads(tmp_path):
    tokenizer = CharacterTokenizer(AWKWARD)
    tokenizer.save(tmp_path / "tokenizer.json")
    contents = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert CharacterTokenizer.from_json(contents).character_to_id == tokenizer.character_to_id


@given(texts | st.text(st.sampled_from(AWKWARD), min_size=1))
def test_the_tokenizers_package_encodes_and_decodes_alike(text):
    ours = CharacterTokenizer(text)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.to_json()))
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_the_tokenizers_package_reads_the_saved_file(tmp_path):
    ours = CharacterTokenizer(AWKWARD)
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (AWKWARD, AWKWARD[::-1], *AWKWARD.split(" ")):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_an_unknown_character_is_shown_with_what_to_do():
    tokenizer = CharacterTokenizer("abc\n")
    for encode in (tokenizer.encode, tokenizer.encode_to_numpy):
        with pytest.raises(SurgeryError) as caught:
            encode("ab\nc😀a")
        message = str(caught.value)
        for part in ("'😀'", "U+1F600", "position 4", "line 2", "4 that", "build the tokenizer"):
            assert part in message


@given(texts, st.characters(exclude_categories=["Cs"]), texts)
def test_the_first_unknown_character_is_the_one_named(before, unknown, after):
    tokenizer = CharacterTokenizer(before.replace(unknown, "") or ("a" if unknown != "a" else "b"))
    known = "".join(c for c in before if c in tokenizer.character_to_id)
    for encode in (tokenizer.encode, tokenizer.encode_to_numpy):
        with pytest.raises(
            SurgeryError, match=rf"U\+{ord(unknown):04X}\) at position {len(known)},"
        ):
            encode(known + unknown + after)


def test_no_unknown_character_passes_for_a_known_one():
    tokenizer = CharacterTokenizer("a\nz")
    for unknown in map(chr, [*range(1000), 0xFFFF, 0x10000, 0x10FFFF]):
        for encode in (tokenizer.encode, tokenizer.encode_to_numpy):
            if unknown not in "a\nz":
                with pytest.raises(SurgeryError, match=f"U\\+{ord(unknown):04X}"):
                    encode(unknown)


def test_an_invisible_character_is_shown_by_its_escape():
    with pytest.raises(SurgeryError, match=r"'\\xa0' \(U\+00A0\)"):
        CharacterTokenizer("ab ").encode("a\u00a0b")


@pytest.mark.parametrize("bad", [3, -1, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(SurgeryError, match=rf"{bad}\b.*\b3\b"):
        CharacterTokenizer("abc").decode([0, bad])


def test_decode_takes_tensors_and_arrays():
    tokenizer = CharacterTokenizer("abc")
    assert tokenizer.decode(torch.tensor([2, 0])) == tokenizer.decode(np.array([2, 0])) == "ca"
    assert tokenizer.decode([]) == ""


def test_an_empty_text_is_refused():
    with pytest.raises(SurgeryError, match=r"CharacterTokenizer.*text is empty"):
        CharacterTokenizer("")


@pytest.mark.parametrize(
    "contents",
    [
        {},
        [],
        {"model": {"type": "BPE", "vocab": {"a": 0}}},
        {"model": {"type": "WordLevel", "vocab": {}}},
        {"model": {"type": "WordLevel", "vocab": {"word": 0}}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": "1"}}},
        {"model": {"type": "WordLevel", "vocab": ["a"]}},
    ],
)
def test_another_tokenizer_json_is_refused(contents):
    with pytest.raises(SurgeryError, match=r"tokenizer\.json"):
        CharacterTokenizer.from_json(contents)


def bytes_as_tiktoken() -> tiktoken.Encoding:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})


def test_tokenizers_are_recognised_by_what_they_can_do():
    assert isinstance(CharacterTokenizer("a"), Tokenizer)
    assert isinstance(bytes_as_tiktoken(), Tokenizer)
    assert not isinstance("text", Tokenizer)


def test_a_tiktoken_encoding_serves_as_the_tokenizer():
    tokenizer, text = bytes_as_tiktoken(), "the other the\nüñ the"
    dataset = GPTDataset(text, tokenizer, block_size=5)
    assert dataset.ids.dtype == torch.int32
    assert dataset.ids.tolist() == tokenizer.encode(text)
    x, y = dataset[0]
    assert tokenizer.decode(x.tolist()) == tokenizer.decode(tokenizer.encode(text)[:5])
    assert x[1:].tolist() == y[:-1].tolist()
